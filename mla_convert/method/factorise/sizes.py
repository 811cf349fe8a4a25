"""Size of the converted cache: rank, rotary dims and bytes from the settings and the model's shape. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import Settings
from mla_convert.source.shape import AttentionShape

if TYPE_CHECKING:
    from mla_convert.modeling.latent_format_mla import LatentFormat

# Kernels need multiples of 16; models too small for that get multiples of 2.
UNIT = 16
MAX_DEFAULT_ROPE = 64
DEFAULT_RATIO = 0.5
# Frequencies of serving engines' RoPE table for latent attention (qk_rope_head_dim 64).
TABLE = 32
# Bytes of a cached number, to which `kv_ratio` refers.
NUMBER = 2
# Channels of a quantised latent that share a scale; fewer where the rotary key has 4 bits, too: in as many bytes, for scales fill
# 16 at a time, that took 6% off the KL (docs/results/quality.md).
GROUP, JOINT_GROUP = 64, 48
# Unit of ranks in 4 bits: 16 bytes, to which sections of a row are padded.
UNIT_INT4 = 32
# "auto" keeps one in WIDE_SHARE channels in 8 bits where layers do not choose, at least one unit of them: the first 32 of 224
# removed nearly all of the loss of 4 bits (docs/results/quality.md).
WIDE_SHARE = 8
# With codes of 4 bits and less than this share of the original's bytes, the rotary key has 4 bits, too. That leaves bytes for more
# rank and more rotary dims, up to half of the rank (docs/results/quality.md).
SMALL_SHARE, MAX_SMALL_ROPE = 0.35, 128


def table_frequencies(num_rotary_freqs: int) -> range:
    """Indices of the frequencies that selection `engine_table` may have: evenly spaced, from the fastest on.

    Every n-th power of theta is again a table of DeepSeek's form, which one number in an engine's configuration gives.

    Args:
        num_rotary_freqs: frequencies of the model's own table.
    """
    freq_stride = max(1, num_rotary_freqs // TABLE)
    return range(0, num_rotary_freqs, freq_stride)[:TABLE]


@dataclass(frozen=True)
class LayerSize:
    """Elements that one layer caches per token: kv_lora_rank (`rank`) and qk_rope_head_dim (`rope_dim`).

    `wide`: channels of the latent with 8 bits, where a cache mixes 8 and 4.
    """

    rank: int
    rope_dim: int
    wide: int = 0

    @property
    def width(self) -> int:
        """Elements per token."""
        return self.rank + self.rope_dim


@dataclass(frozen=True)
class CacheFormat:
    """Numbers of a cached token.

    Attributes:
        kind: "bf16" (not quantised), or a kind of `LatentFormat`.
        group: as in `LatentFormat`.
        rope: as in `LatentFormat`.
    """

    kind: str = "bf16"
    group: int = 0
    rope: str = "bf16"

    @property
    def quantised(self) -> bool:
        """Whether tokens are packed rows."""
        return self.kind != "bf16"

    def row(self, size: LayerSize) -> LatentFormat | None:
        """Layout of one layer's rows; None if they are numbers."""
        if not self.quantised:
            return None
        from mla_convert.modeling.latent_format_mla import LatentFormat  # imports torch

        wide = size.wide if self.kind == "mixed" else -1
        return LatentFormat(self.kind, size.rank, size.rope_dim, self.group, wide, self.rope)

    def row_bytes(self, size: LayerSize) -> int:
        """Bytes of a token in one layer; NUMBER for each element that is not quantised."""
        row = self.row(size)
        return row.row_bytes if row else NUMBER * size.width

    def possible(self, rank: int) -> int:
        """The largest rank up to this one that has a row: two channels of 4 bits share a byte."""
        return rank // 2 * 2 if self.kind in ("int4", "mixed") else rank

    def units(self, unit: int) -> tuple[int, int]:
        """Units of ranks and of rotary dims.

        Args:
            unit: from `size_unit`.
        """
        return (UNIT_INT4 if unit == UNIT and self.kind in ("int4", "mixed") else unit), unit


def cache_format(settings: Settings) -> CacheFormat:
    """The format that the settings name."""
    small = settings.kv_ratio is not None and settings.kv_ratio < SMALL_SHARE
    # With few bytes, channels of 8 bits are worth less than the rotary dims and the rank that they take the place of.
    auto = "int4" if small and settings.cache_rope in (None, "int4") else "mixed"
    kind = {"auto": auto}.get(settings.cache_dtype, settings.cache_dtype)
    if kind == "bf16":
        return CacheFormat()
    rope = settings.cache_rope or ("int4" if small and kind in ("int4", "mixed") else "fp8")
    if rope == "int4" and kind not in ("int4", "mixed"):
        raise UsageError(
            f"cache_rope int4 needs codes of 4 bits: give --cache-dtype int4 or auto, not {settings.cache_dtype}"
        )
    group = settings.cache_group or (0 if kind == "fp8" else JOINT_GROUP if rope == "int4" else GROUP)
    return CacheFormat(kind, group, rope)


@dataclass(frozen=True)
class Plan:
    """Sizes of the converted cache.

    Layers without RoPE, where a model has some, spend the whole budget on the latent.

    Attributes:
        rank: of every layer, or on average where `sizes` are set.
        rope_dim: likewise.
        shape: of the source's attention.
        sizes: of each layer with a latent of its own, where they differ.
        cache: numbers of a cached token.
        wide: channels with 8 bits in a mixed cache, likewise.
        budget: bytes per token and layer that layers share out; None: those of the mean sizes.
        nope_dim: most content dims of a head in layers with RoPE; None: head_dim.
    """

    rank: int
    rope_dim: int
    shape: AttentionShape
    sizes: tuple[LayerSize, ...] | None = None
    cache: CacheFormat = CacheFormat()
    wide: int = 0
    budget: float | None = None
    nope_dim: int | None = None

    def layer(self, index: int) -> LayerSize:
        """Sizes of the latent that one converted layer attends to."""
        index = self.shape.source_of(index)
        if self.sizes:
            return self.sizes[self.shape.caching_layers.index(index)]
        if self.shape.has_rope(index):
            return LayerSize(self.rank, self.rope_dim, self.wide)
        return LayerSize(self.cache.possible(min(self.rank + self.rope_dim, self.shape.full_rank(0))), 0, self.wide)

    def of(self, index: int) -> Plan:
        """The plan of a model whose layers are all like this one, where layers of the source differ; else this plan."""
        if self.shape.heads is None:
            return self
        size = self.layer(index)
        alone = replace(self, rank=size.rank, rope_dim=size.rope_dim, wide=size.wide, shape=self.shape.of(index))
        return replace(alone, sizes=None)

    @property
    def layers(self) -> list[LayerSize]:
        """Sizes of all layers with a latent of their own."""
        return [self.layer(index) for index in self.shape.caching_layers]

    @property
    def cache_width(self) -> int:
        """Elements per token and layer that the settings ask for, the mean over layers where they differ."""
        return self.rank + self.rope_dim

    @property
    def row_bytes(self) -> float:
        """Bytes per token and layer that the settings ask for, the mean over layers where they differ."""
        if self.shape.heads and self.sizes:
            return sum(map(self.cache.row_bytes, self.sizes)) / len(self.sizes)
        return self.cache.row_bytes(LayerSize(self.rank, self.rope_dim, self.wide))

    @property
    def cache_ratio(self) -> float:
        """Bytes of the cache as a fraction of the source's, with NUMBER bytes a number."""
        widths = self.shape.cache_widths
        return self.row_bytes / (NUMBER * sum(widths) / len(widths))

    @property
    def latent_cache(self) -> dict[str, object] | None:
        """The field of this name in the converted model's configuration."""
        if not self.cache.quantised:
            return None
        from mla_convert.modeling.latent_format_mla import VERSION  # imports torch

        fields = {"version": VERSION, "kind": self.cache.kind, "group": self.cache.group, "rope": self.cache.rope}
        if self.cache.kind != "mixed":
            return fields
        wide = {layer: self.layer(layer).wide for layer in self.shape.converted_layers}
        return fields | {"wide": [wide.get(layer, 0) for layer in range(self.shape.layers)]}

    @property
    def full_rank(self) -> int:
        """Rank at which only the rotation of the planes that are not kept is lost; the mean where heads differ by layer."""
        if self.shape.heads is None:
            return self.shape.full_rank(self.rope_dim)
        alone = [self.of(layer) for layer in self.shape.caching_layers]
        return _mean([plan.shape.full_rank(plan.rope_dim) for plan in alone])

    @property
    def exact(self) -> bool:
        """Whether every plane keeps RoPE, no direction is dropped and no number is rounded."""
        if self.shape.heads:
            return all(self.of(layer).exact for layer in self.shape.caching_layers)
        whole = self.rope_dim == self.shape.full_rope_dim and self.rank == self.full_rank
        # With every plane rotary, dims that RoPE does not rotate are the only content.
        still = 0 if self.shape.rotary_dim is None else self.shape.head_dim - self.shape.rotary_dim
        return whole and not self.cache.quantised and (self.nope_dim is None or self.nope_dim >= still)

    @property
    def qk_nope_head_dim(self) -> int:
        """Width of a head's content key, the largest of all layers."""
        return max(self.layer_nope_dim(layer) for layer in self.shape.converted_layers)

    def layer_nope_dim(self, layer: int) -> int:
        """qk_nope_head_dim of one layer: 0 where every dim of every key head stays rotary."""
        shape = self.shape.of(layer)
        all_dims = shape.num_kv_heads * shape.head_dim
        return 0 if self.layer(layer).rope_dim == all_dims else self.most_nope_dim(layer)

    def most_nope_dim(self, layer: int) -> int:
        """Most content dims of a head of one layer.

        Without RoPE it is head_dim, because no rotary dims make these heads wider than the original's.
        """
        width = self.shape.of(layer).head_dim
        return min(self.nope_dim, width) if self.nope_dim and self.shape.has_rope(layer) else width


def shares_out(settings: Settings, plan: Plan) -> bool:
    """Whether the conversion chooses a size for each layer by its sensitivity; the plan then holds their mean."""
    free = not settings.uniform and settings.rope_selection == "by_loss"
    several = len(plan.shape.caching_layers) > 1
    return free and several and (plan.rank < plan.full_rank or plan.budget is not None)


def size_unit(plan: Plan) -> int:
    """Unit of which per-layer sizes are multiples. A model without RoPE has ranks only."""
    if plan.shape.heads:
        return min(size_unit(plan.of(layer)) for layer in plan.shape.caching_layers)
    smallest = min(plan.rank, plan.shape.full_rope_dim - 1) if plan.shape.full_rope_dim else plan.rank
    # Each layer gets a unit of either kind at least, which must leave something to share out.
    least = UNIT * (1 + (plan.rope_dim > 0))
    return UNIT if smallest >= UNIT and plan.rank + plan.rope_dim > least else 2


def make_plan(settings: Settings, shape: AttentionShape) -> Plan:
    """Choose rank and rotary dims of the converted cache.

    Raises:
        InputError: a rank, rope_dim, nope_dim or kv_ratio that this model cannot have.
    """
    return replace(_cache_plan(settings, shape), nope_dim=_nope_dim(settings, shape))


def _cache_plan(settings: Settings, shape: AttentionShape) -> Plan:
    if isinstance(settings.rank, int) and settings.rank <= 0:
        raise InputError(f"rank {settings.rank} is not positive: give a rank of at least 1, or 'full'")
    if shape.heads:
        return _plan_by_layer(settings, shape)
    if settings.rank is None:
        return _plan_from_ratio(settings, shape)
    rope_dim = _rope_dim(settings, shape, _default_rope(shape, settings.rank))
    full = shape.full_rank(rope_dim)
    rank = full if settings.rank == "full" else settings.rank
    if rank > full:
        raise InputError(
            f"rank {rank} is above full rank: with {rope_dim} rotary dims this model has rank {full}; "
            f"give at most that, or 'full'"
        )
    return _with_format(Plan(rank, rope_dim, shape), settings)


def _plan_by_layer(settings: Settings, shape: AttentionShape) -> Plan:
    """The plan of a model whose layers have heads of their own: each layer's sizes are those of a model of such layers.

    A rank or rope_dim that only some layers can have is the most that the others have.
    """
    layers = shape.caching_layers
    shapes = [shape.of(layer) for layer in layers]
    _rope_dim(settings, max(shapes, key=lambda each: each.full_rope_dim), 0)  # refuses what no layer can have
    ranks = settings.rank if isinstance(settings.rank, int) else None

    def plan_of(own: AttentionShape) -> Plan:
        possible: dict[str, int | None] = {"nope_dim": None}  # that of the plan holds for all layers
        if isinstance(settings.rope_dim, int):
            possible["rope_dim"] = min(settings.rope_dim, own.full_rope_dim)
        if ranks is not None:
            rope_dim = _rope_dim(settings.model_copy(update=possible), own, _default_rope(own, ranks))
            possible["rank"] = min(ranks, own.full_rank(rope_dim))
        return make_plan(settings.model_copy(update=possible), own)

    plans = [plan_of(own) for own in shapes]
    sizes = tuple(plan.layer(layer) for layer, plan in zip(layers, plans, strict=True))
    if ranks is not None and ranks > max(size.rank for size in sizes):
        make_plan(settings, max(shapes, key=lambda each: each.full_rank(0)))  # refuses it
    budgets = [plan.budget for plan in plans if plan.budget is not None]
    mean = {name: _mean([getattr(size, name) for size in sizes]) for name in ("rank", "rope_dim", "wide")}
    budget = sum(budgets) / len(budgets) if budgets else None
    return Plan(shape=shape, sizes=sizes, cache=plans[0].cache, budget=budget, **mean)


def _mean(sizes: list[int]) -> int:
    return round(sum(sizes) / len(sizes))


def _plan_from_ratio(settings: Settings, shape: AttentionShape) -> Plan:
    ratio = DEFAULT_RATIO if settings.kv_ratio is None else settings.kv_ratio
    if not 0 < ratio <= 1:
        raise InputError(f"kv_ratio {ratio} is not a share: give a number above 0 and at most 1 (0.5 halves the cache)")
    if settings.cache_dtype != "bf16":
        return _quantised_from_ratio(settings, shape, ratio)
    unit = UNIT if ratio * shape.cache_width >= 4 * UNIT else 2
    total = int(ratio * shape.cache_width / unit + 1e-9) * unit
    rope_dim = _rope_dim(settings, shape, min(_round_up(total / 4, unit), MAX_DEFAULT_ROPE, shape.full_rope_dim))
    rank = min(total - rope_dim, shape.full_rank(rope_dim))
    if rank <= 0:
        raise InputError(
            f"kv_ratio {ratio} leaves {total} numbers per token and layer, and {rope_dim} are rotary: "
            f"give a larger kv_ratio or a smaller rope_dim"
        )
    return Plan(rank, rope_dim, shape)


def _with_format(plan: Plan, settings: Settings) -> Plan:
    """A plan with the cache format of the settings.

    Raises:
        InputError: the format has no row of this size.
    """
    cache = cache_format(settings)
    if cache.possible(plan.rank) != plan.rank:
        raise InputError(f"rank {plan.rank} is odd, and two channels of 4 bits share a byte: give an even rank")
    unit = cache.units(size_unit(plan))[0]
    wide = min(max(plan.rank // WIDE_SHARE // unit, 1) * unit, plan.rank) if cache.kind == "mixed" else 0
    if cache.rope == "int4":  # here the bytes keep more as rank
        wide = 0
    return replace(plan, cache=cache, wide=wide)


def _quantised_from_ratio(settings: Settings, shape: AttentionShape, ratio: float) -> Plan:
    """The largest rank whose packed row fits the share of the original's bytes.

    Raises:
        InputError: none does.
    """
    room, plan, cache = ratio * shape.cache_width * NUMBER, None, cache_format(settings)
    part, most = (2, MAX_SMALL_ROPE) if cache.rope == "int4" else (3, MAX_DEFAULT_ROPE)
    for step in (UNIT, 2):
        unit = cache.units(step)[0]
        rank = unit
        while plan is None or rank <= plan.full_rank:
            rope_dim = _rope_dim(settings, shape, min(_round_up(rank / part, step), most, shape.full_rope_dim))
            possible = cache.possible(min(rank, shape.full_rank(rope_dim)))
            larger = _with_format(Plan(possible, rope_dim, shape), settings)
            if larger.row_bytes > room or (plan and larger == plan):
                break
            plan, rank = larger, rank + unit
        if plan:
            return replace(plan, budget=room)
    raise InputError(
        f"kv_ratio {ratio} leaves {room:.0f} bytes per token and layer, less than the smallest row in "
        f"{settings.cache_dtype}: give a larger kv_ratio or a smaller rope_dim"
    )


def _default_rope(shape: AttentionShape, rank: int | str) -> int:
    """A third of the rank, so that a quarter of the cache is rotary, near the best that was measured."""
    largest = min(MAX_DEFAULT_ROPE, shape.full_rope_dim)
    if rank == "full":
        return largest
    unit = UNIT if rank >= 3 * UNIT else 2
    return min(_round_up(rank / 3, unit), largest)


def _rope_dim(settings: Settings, shape: AttentionShape, default: int) -> int:
    full = shape.full_rope_dim
    rope_dim = {"full": full, None: default}.get(settings.rope_dim, settings.rope_dim)
    if settings.rope_selection == "engine_table":
        num_rotary_freqs = 0 if not full else full // shape.num_kv_heads // 2
        limit = 2 * len(table_frequencies(num_rotary_freqs))
        rope_dim = min(rope_dim, limit) if settings.rope_dim in (None, "full") else rope_dim
        if rope_dim > limit:
            raise InputError(
                f"rope_dim {rope_dim} is above {limit}: --rope-selection engine_table has a frequency each; give at most that"
            )
    if rope_dim < 0 or rope_dim % 2:
        raise InputError(f"rope_dim {rope_dim} is not an even number of at least 0: every rotary plane takes two dims")
    if rope_dim > full:
        raise InputError(f"rope_dim {rope_dim} is above the {full} rotary dims that this model has; give at most that")
    return rope_dim


def _nope_dim(settings: Settings, shape: AttentionShape) -> int | None:
    """Content dims of a head; None where heads keep all of them."""
    nope_dim = settings.nope_dim
    width = max(heads.head_dim for heads in shape.heads) if shape.heads else shape.head_dim
    if nope_dim in (None, "full"):
        return None
    if nope_dim < 1 or nope_dim > width:
        raise InputError(
            f"nope_dim {nope_dim} is not from 1 to {width}, this model's head_dim: give such a number, or 'full'"
        )
    if not shape.full_rope_dim or not any(map(shape.has_rope, shape.converted_layers)):
        raise InputError(f"nope_dim {nope_dim} is for heads with rotary dims, and this model has no RoPE: leave it out")
    return None if nope_dim == width else nope_dim


def _round_up(value: float, unit: int) -> int:
    return -int(-value // unit) * unit
