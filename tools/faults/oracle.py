"""What a model must compute, from first principles: a float64 twin whose weights are the base plus every map that acts now."""
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from models import adapter_of, build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS, IDS = 2, torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(5))
TARGETS = dict(llama=(("q_proj", "k_proj"), ("k_proj", "down_proj"), ("up_proj",)),
               gpt2=(("c_attn",), ("c_attn", "mlp.c_proj"), ("c_fc",)))
RANGE = dict(llama=(0.25, 0.75), gpt2=(0.0, 1.0))
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.5}


def made(kind: str, model: nn.Module, arch: str, number: int):
    "An adapter of a kind on some of the layers; the number decides on which, and what is in it."
    return adapter_of(kind, model, seed=number, r=2 + number % 2, targets=TARGETS[arch][number % 3], layer_range=RANGE[arch])


def delta(a, name: str) -> Tensor: # (o, i), float64
    "What an adapter adds to a weight at a dose of one, by its formula."
    if a.kind == "lora": return a.cfg.alpha / a.cfg.r * a.B[name].detach().double() @ a.A[name].detach().double()
    return a.U[name].double() * a.delta_s[name].detach().double() @ a.Vh[name].double()


def deltas(a) -> dict[str, Tensor]: return {name: delta(a, name) for name in a.layers}


@dataclass(eq=False)
class Kept:
    "An adapter, and what is known of it."
    a: object
    rounds: dict # layer -> ids of the extractions that were in force when it was made
    base: int # which base it was made on
    attached: bool = False
    extracted: bool = False
    baked: set = field(default_factory=set) # layers that it was folded into for good


@dataclass(eq=False)
class Block:
    "Something that acts until it is left."
    what: str # "attach", "stack" or "fold"
    members: list # of Kept
    leave: Callable
    maps: dict = field(default_factory=dict) # layer -> (o, i), of a stack or a fold: a snapshot
    doses: list = field(default_factory=lambda: [1.0] * ROWS) # one per row
    item: object = None

    def acts(self, row: int) -> dict[str, Tensor]:
        "What it adds to each weight for one row."
        maps = deltas(self.members[0].a) if self.what == "attach" else self.maps
        return {name: self.doses[row] * m for name, m in maps.items()}


class Oracle:
    "The base, bit for bit, and the twin that computes with it in float64."
    def __init__(self, arch: str):
        self.model = build(arch, tied=False)
        self.model.requires_grad_(False)
        self.twin = copy.deepcopy(self.model).double()
        self.candidates = {n: [p.detach().clone()] for n, p in self.model.named_parameters()} # of the base, by parameter
        self.visited = {torch.float32} # dtypes since the base was last seen whole

    def weight(self, name: str) -> str: return f"{name}.weight"

    def cast(self, dtype: torch.dtype, changed: set[str]) -> None:
        "The model was cast. A weight that something is in force on may come back as it was, or as the cast left it."
        for name, known in self.candidates.items():
            cast = [t.to(dtype) for t in known]
            self.candidates[name] = known + cast if name in changed else cast
        self.visited.add(dtype)

    def replaced(self, values: dict[str, Tensor]) -> None:
        "The base is another one."
        self.candidates = self.candidates | {n: [t.detach().clone()] for n, t in values.items()}

    def wrong(self, changed: set[str], model: nn.Module | None = None) -> list[str]:
        "Parameters that are not the base bit for bit, though nothing is in force on them."
        found = []
        for name, p in (model or self.model).named_parameters():
            if name in changed: continue
            same = [t for t in self.candidates[name] if torch.equal(p, t.to(p.dtype))]
            if not same: found.append(name)
            elif model is None: self.candidates[name] = same[:1] if same[0].dtype == p.dtype else [p.detach().clone()]
        if model is None and not changed: self.visited = {self.model.dtype}
        return found

    @torch.no_grad()
    def logits(self, blocks: list[Block]) -> Tensor:
        "What the model must say with these blocks in force."
        doses = [[b.doses[row] for b in blocks] for row in range(ROWS)]
        if doses[0] == doses[1]: return self.once(blocks, 0, IDS)
        return torch.cat([self.once(blocks, row, IDS[row:row + 1]) for row in range(ROWS)])

    def once(self, blocks: list[Block], row: int, ids: Tensor) -> Tensor:
        acts = [b.acts(row) for b in blocks]
        params = dict(self.twin.named_parameters())
        for name, p in params.items(): p.copy_(self.candidates[name][-1])
        for maps in acts:
            for name, m in maps.items():
                conv = isinstance(self.twin.get_submodule(name), Conv1D)
                params[self.weight(name)].add_(m.T if conv else m)
        return self.twin(input_ids=ids).logits

    @property
    def tolerance(self) -> float: return max(TOLERANCE[d] for d in self.visited)
