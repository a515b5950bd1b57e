"""How far does an FP8 trunk move a language model's loss on real text, its weights held fixed?

    python bench/fp8_shift.py MODEL_DIR TEXT_FILE [--rows 8] [--tokens 512]

The same rows of text go through transformers' layers in bf16, the fused layers in bf16 and the
fused layers with their weights in FP8. Nothing trains, so nothing drifts apart: what is left is the
rounding. It runs on a CPU too, where torch multiplies FP8 slowly (torch 2.13).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vistune import _compat
from vistune.models.fused.trunk import fuse


def losses(model: Any, rows_RT: Tensor, *, fp8: bool | None) -> Tensor:
    """Returns the mean loss of each row, in nats.

    Args:
        model: In bf16.
        rows_RT: int64 [R, T].
        fp8: Whether the fused layers read FP8; None for transformers' own layers.
    """
    decoder = _compat.decoder_of(model)
    device = rows_RT.device
    trunk = None if fp8 is None else fuse(decoder, device=device, fp8=fp8)
    found, num_tokens = [], rows_RT.shape[1]
    positions_BT = torch.arange(num_tokens, device=device)[None]
    edges = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    for row_T in rows_RT:
        embeds_BTD = model.get_input_embeddings()(row_T)[None]
        if trunk is None:
            hidden_BTD = decoder(
                inputs_embeds=embeds_BTD, position_ids=positions_BT
            ).last_hidden_state
        else:
            hidden_BTD = trunk.hidden_states(
                embeds_BTD, positions_BT, cu_seqlens=edges, max_seqlen=num_tokens
            )
        logits = model.lm_head(hidden_BTD[0, :-1]).float()
        found.append(F.cross_entropy(logits, row_T[1:]))
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skip", type=int, default=20_000, help="characters at the start")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = args.text.read_text(encoding="utf-8", errors="ignore")[args.skip :]
    count = args.rows * args.tokens
    ids = AutoTokenizer.from_pretrained(args.model)(
        text[: 8 * count], return_tensors="pt"
    ).input_ids
    rows_RT = ids[0, :count].view(args.rows, args.tokens).to(device)
    found = {}
    for name, fp8 in (("transformers", None), ("fused", False), ("fused in FP8", True)):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
        with torch.no_grad():
            found[name] = losses(model.eval().requires_grad_(False), rows_RT, fp8=fp8).cpu()
    base = found["fused"]
    for name, values in found.items():
        each = ((values - base) / base).abs().mean()
        shift = values.mean() / base.mean() - 1
        print(f"{name:14} loss {values.mean():.4f}, {shift:+.3%}, a row {each:.3%}", flush=True)


if __name__ == "__main__":
    main()
