"""Two ways to compare a free-form answer with the gold: exact match and VQA soft accuracy.

The VQA answer processor is reproduced with its peculiarities, because published scores contain
them; exact match is our own and treats every script alike.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(value)
    for value, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# re.sub takes a count where the public code passes re.UNICODE, whose value is 32.
_MAX_PERIODS = int(re.UNICODE)
_APOSTROPHE_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    """Returns every spelling that lacks exactly one apostrophe, with the form it stands for."""
    table = {"somebody'd": "somebodyd"}  # the other way round in the public table
    for form in _APOSTROPHE_FORMS.split():
        for position, letter in enumerate(form):
            if letter == "'":
                table[form[:position] + form[position + 1 :]] = form
    return table


_CONTRACTIONS = _without_one_apostrophe()


def vqa_processed(answer: str) -> str:
    """Normalises an answer as the public VQA and TextVQA evaluators do.

    Kept on purpose: a punctuation mark that touches a space anywhere is deleted everywhere, else it
    becomes a space; a period before a digit stays; only the first 32 periods go; number words from
    "none" to "ten" become digits; articles go; contractions get their apostrophe back.

    Args:
        answer: Raw answer.

    Source:
        EvalAIAnswerProcessor of the TextVQA evaluation that LLaVA-1.5 uses.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    processed = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if touches_space else " ")
    processed = _PERIOD.sub("", processed, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in processed.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Returns the soft score of every distinct annotated answer.

    An answer's score is the mean over annotators of min(1, others who gave it / 3): 0.3, 0.6, 0.9
    and 1.0 for 1, 2, 3 and at least 4 of 10.

    Args:
        answers: One answer per annotator, raw.

    Returns:
        Processed answer -> score in [0, 1].

    Source:
        TextVQAAccuracyEvaluator of the same evaluation.
    """
    processed = [vqa_processed(answer) for answer in answers]
    scores = {}
    for candidate in sorted(set(processed)):
        credits = []
        for left_out in range(len(processed)):
            others = processed[:left_out] + processed[left_out + 1 :]
            credits.append(min(1.0, others.count(candidate) / 3))
        scores[candidate] = sum(credits) / len(credits)
    return scores


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the VQA soft accuracy of one prediction, in [0, 1].

    Args:
        prediction: The model's answer, raw.
        answers: One answer per annotator, raw.
    """
    return vqa_answer_scores(answers).get(vqa_processed(prediction), 0.0)


def normalised(answer: str) -> str:
    """Returns an answer without what does not change its meaning.

    Full-width forms become half-width, case is folded, a leading article, punctuation at either end
    and repeated spaces go. Punctuation inside stays ("3.5", "7:30").

    Args:
        answer: Raw answer in any script.
    """
    text = unicodedata.normalize("NFKC", answer).casefold()
    text = text.strip(string.whitespace + string.punctuation + "。，、；：？！“”‘’「」《》…—·")
    words = text.split()
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 when the normalised prediction is one of the normalised answers, else 0.0.

    Args:
        prediction: The model's answer, raw.
        answers: All answers that count as right.
    """
    return float(normalised(prediction) in {normalised(answer) for answer in answers})
