"""A tiny vision-language model and data that follow the contracts, to test the loop alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from vistune.checkpoint.load import read_weights
from vistune.checkpoint.manifest import Manifest
from vistune.device import Device, seed_everything
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train.fit import Job, TrainResult, fit
from vistune.train.hooks import ConsoleHook, MetricsHook
from vistune.train.opening import open_run
from vistune.types import Batch, Rejected, RoleName

VOCABULARY = 37
CPU = Device(torch.device("cpu"), "test", torch.float32)


class FakeVLM(nn.Module):
    """Sees the mean of its own sample so far, plus noise from dropout; images shift that mean."""

    def __init__(self, *, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.vision_tower = nn.Linear(3, width)
        self.connector = nn.Linear(width, width)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def hidden_states(
        self,
        *,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        pixel_values_NCYX: torch.Tensor | None,
    ) -> torch.Tensor:
        embedded_TD = self.embedding(input_ids_BT[0])
        pixels = torch.zeros(1, 3, 1, 1) if pixel_values_NCYX is None else pixel_values_NCYX
        seen_D = self.connector(self.vision_tower(pixels.mean((2, 3)))).mean(0)
        pieces = [
            embedded_TD[start:end].cumsum(0)
            / torch.arange(1, end - start + 1, device=embedded_TD.device)[:, None]
            for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
        mixed_TD = torch.cat(pieces) + seen_D * (0.0 if pixel_values_NCYX is None else 1.0)
        return (embedded_TD + torch.tanh(self.mix(self.dropout(mixed_TD))))[None]

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_MD)


@dataclass(frozen=True)
class Group:
    role: RoleName
    lr: float
    weight_decay: float
    names: tuple[str, ...]


def groups_of(model: FakeVLM, lr: float = 1e-2) -> list[Group]:
    language = ("embedding.weight", "mix.weight", "mix.bias")
    return [
        Group("connector", lr, 0.1, ("connector.weight", "connector.bias")),
        Group("language", lr / 2, 0.0, language),
    ]


def make_row(
    lengths: Sequence[int],
    *,
    seed: int,
    sources: Sequence[str] | None = None,
    rejected: tuple[Rejected, ...] = (),
) -> Batch:
    """A packed row of random samples; every second sample of it has an image's worth of pixels."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(bounds[-1])
    ids = torch.randint(0, VOCABULARY, (total,), generator=generator)
    index, samples = [], []
    for number, length in enumerate(lengths):
        for position in range(length // 2, length - 1):
            index.append(int(bounds[number]) + position)
            samples.append(number)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(
        input_ids_BT=ids[None],
        position_ids_BT=positions[None],
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        target_index_M=torch.tensor(index),
        target_ids_M=ids[torch.tensor(index) + 1],
        target_sample_M=torch.tensor(samples),
        pixel_values_NCYX=torch.randn(1, 3, 2, 2, generator=generator),
        sample_ids=tuple(f"{seed}-{n}" for n in range(len(lengths))),
        sources=tuple(sources or ["main"] * len(lengths)),
        num_image_tokens=1,
        rejected=rejected,
    )


@dataclass
class FakeData:
    """Steps that are a pure function of their number."""

    num_samples: int = 12
    per_epoch: int = 6
    poison: frozenset[int] = frozenset()
    rejected: dict[int, tuple[Rejected, ...]] = field(default_factory=dict)
    closed: bool = False

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return self.per_epoch

    def samples_per_epoch(self, epoch: int = 0) -> int:
        return self.num_samples

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        number = start_step
        while True:
            rows = [
                make_row((7, 4), seed=2 * number),
                make_row((9,), seed=2 * number + 1, rejected=self.rejected.get(number, ())),
            ]
            if number in self.poison:
                assert rows[1].pixel_values_NCYX is not None
                rows[1].pixel_values_NCYX.fill_(float("nan"))
            yield rows
            number += 1

    def close(self) -> None:
        self.closed = True


def resolved_recipe(run_dir: Path, **sections: object) -> ResolvedRecipe:
    tree: dict[str, object] = {
        "name": "test",
        "run_dir": str(run_dir),
        "model": {"vision_tower": {"path": "v"}, "language_model": {"path": "l"}},
        "data": {"train": [{"path": "d.json"}]},
        "batch": {"samples": 3},
        "train": {"steps": 8, "schedule": "cosine", "warmup_frac": 0.2},
        "save": {"every_steps": 2, "keep": 3},
    } | sections
    return ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test.yaml")


def run(
    resolved: ResolvedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: FakeData | None = None,
    dropout: float = 0.3,
    console: Console | None = None,
    rehearsals: Mapping[int, str] | None = None,
) -> TrainResult:
    """Trains the fake model as `train` would the real one."""
    console = console or Console(quiet=True)
    recipe = resolved.recipe
    with open_run(resolved, resume=resume, overwrite=overwrite, console=console) as opened:
        opened.set_aside_earlier()
        opened.directory.record_start(
            resolved, versions={}, device="test", resumed_from=opened.progress.step
        )
        seed_everything(recipe.seed)
        model = FakeVLM(dropout=dropout)
        if opened.checkpoint is not None:
            model.load_state_dict(read_weights(opened.checkpoint), strict=False)
        groups = groups_of(model, recipe.train.lr * 10)
        trained = {name for group in groups for name in group.names}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

        def manifest(step: int) -> Manifest:
            return Manifest(
                vistune_version="0",
                kind="checkpoint",
                step=step,
                recipe=recipe.model_dump(mode="json"),
            )

        return fit(
            Job(
                recipe=recipe,
                opened=opened,
                device=CPU,
                model=model,
                groups=groups,
                vocabulary_size=VOCABULARY,
                sources=("main",),
                data=data or FakeData(),
                data_fingerprint="x",
                manifest=manifest,
                hooks=lambda total: [
                    MetricsHook(opened.directory.metrics),
                    ConsoleHook(console, total_steps=total, live=False),
                ],
                console=console,
                rehearsals=rehearsals or {},
            )
        )
