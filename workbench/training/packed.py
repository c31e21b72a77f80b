"""Passes without padding: all tokens of a batch as one row, through transformers' own forward.

A registered attention function knows where each sequence begins and ends, and each layer is told which rows are there:
rows whose activations are known enter at their own layer. Every other operation of an encoder or decoder works token by
token, so nothing else has to know. Whether a model is such a one is tried out, not assumed (`Packed.fault`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from .base import Base, configs_of
from .layout import Group, Layout, Stage, lay_out
from .rows import ranges

if TYPE_CHECKING:
    from workbench.adapters.bank import Bank

ATTENTION = "workbench_packed"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}  # of the largest logit

RECOMPILE_LIMIT = 256  # adapters of so many shapes may come by before torch.compile gives up
Known = Callable[[Group, int, Tensor], Tensor]  # activations of some of a group's rows at a layer, one after the other


class Reached(Exception):
    """A pass has come to the layer whose activations were asked for."""


class Scored(NamedTuple):
    """Positions of one group that are scored, or some of them.

    Attributes:
        group: its number in the pass.
        hidden: what came of them, `(n, width)`, or `(n, classes)` where they went through the head with all others.
        labels: the right ids, `(n,)`.
        places: where they are among the group's tokens, `(n,)`.
    """

    group: int
    hidden: Tensor
    labels: Tensor
    places: Tensor

    def split(self, size: int) -> list[Scored]:
        """Parts of at most so many positions."""
        parts = zip(self.hidden.split(size), self.labels.split(size), self.places.split(size), strict=True)
        return [Scored(self.group, *part) for part in parts]


class Packed:
    """A base model that runs packed passes.

    Attributes:
        layers: of the model.
        pooled: one position of each row is what the task's head reads (SEQ_CLS).
        bank: the bank that is on the model, None for one trial alone; it is told the sizes of its groups.
        checkpointing: compute the layers' activations again in the backward pass.
        compiled: the layers go through torch.compile.
    """

    def __init__(self, base: Base):
        self.base = base
        self.model: Any = base.model
        self.layers = transformer_layers(self.model)
        self.pooled = base.task == "SEQ_CLS"
        self.reads_last = isinstance(
            getattr(self.model, "score", None), nn.Module
        )  # decoders, as transformers has them
        self.by_head = base.task == "CAUSAL_LM"  # the output layer is applied to what is scored only
        self.bank: Bank | None = None
        self.checkpointing = self.compiled = False
        self.layout: Layout
        self._known: Known
        self._stage: Stage
        self._goal: int | None = None
        self._what = "all"  # stage, firsts, rows or scored: what is being computed, see `positions`

    @property
    def depth(self) -> int:
        return len(self.layers)

    # ---------------------------------------------------------------- which models

    def fault(self, group: Group) -> str:
        """Why the model cannot run packed, found by comparing a padded and a packed pass; "" if it can."""
        if not self.layers or self.base.task == "SEQ_2_SEQ_LM":
            return "it has no single stack of layers"
        fault = self._difference(group)
        if fault and self.by_head:
            self.by_head = False  # some models do more to the logits than their output layer
            fault = self._difference(group)
        return fault

    def _difference(self, group: Group) -> str:
        try:
            with torch.no_grad():
                packed, padded = self.scores([group])[0].float(), self._padded(group).float()
        except Exception as error:  # whatever a model does with an input that it was not made for
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if packed.shape != padded.shape:
            return "its output has another shape"
        off = float((packed - padded).abs().max() / padded.abs().max().clamp_min(1e-3))
        return "" if off <= TOLERANCE[self.model.dtype] else f"its output differs by {off:.1e} of the largest"

    def _padded(self, group: Group) -> Tensor:
        """The scored positions' logits by a plain padded pass."""
        lengths = group.lengths
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(there.shape, group.rows.split.pad_token_id)
        types = torch.zeros_like(ids)
        where = group.rows.tokens(group.indices)
        ids[there] = group.rows.ids[where]
        inputs = {"input_ids": ids, "attention_mask": there.long()}
        if group.rows.types is not None:
            types[there] = group.rows.types[where]
            inputs["token_type_ids"] = types
        logits = self.model(**{name: tensor.to(self.base.device) for name, tensor in inputs.items()}).logits
        if self.pooled:
            return logits
        scored = group.targets(self.base.task == "CAUSAL_LM") >= 0
        return logits[there.to(logits.device)][scored.to(logits.device)]

    @functools.cached_property
    def before(self) -> set[str]:
        """Paths of the modules that run before the first layer, by trying it out."""
        seen: set[str] = set()
        handles = [m.register_forward_pre_hook(lambda *_, n=n: seen.add(n)) for n, m in self.model.named_modules()]
        first = set()
        handles.append(self.layers[0].register_forward_pre_hook(lambda *_: first.update(seen)))
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, 2, dtype=torch.long, device=self.base.device))
        finally:
            for handle in handles:
                handle.remove()
        return first

    @functools.cached_property
    def prefix(self) -> str:
        """What the names of the layers start with."""
        return next(name for name, m in self.model.named_modules() if m is self.layers) + "."

    def layer_of(self, name: str) -> int:
        """The layer that a parameter lies in: 0 also for what comes before, `depth` for what comes after all."""
        if name.startswith(self.prefix):
            return int(name.removeprefix(self.prefix).partition(".")[0])
        parts = name.split(".")
        early = any(".".join(parts[:n]) in self.before for n in range(1, len(parts)) if not self._leads_on(parts[:n]))
        return 0 if early else self.depth

    def _leads_on(self, parts: list[str]) -> bool:
        return self.prefix.startswith(".".join(parts) + ".")

    # ---------------------------------------------------------------- passes

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model's layers and attention take packed passes while this is entered."""
        with ExitStack() as after:
            for config in configs_of(self.model):
                after.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = ATTENTION
                if getattr(config, "use_cache", False):
                    after.callback(setattr, config, "use_cache", True)
                    config.use_cache = False
            for i, layer in enumerate(self.layers):
                after.callback(layer.__dict__.pop, "forward", None)
                forward = self._compiled_layers[i] if self.compiled else layer.forward
                layer.forward = functools.partial(self._run_layer, i, layer, forward)
            CURRENT.append(self)
            after.callback(CURRENT.pop)
            yield

    @functools.cached_property
    def _compiled_layers(self) -> list[Callable[..., Any]]:
        """The layers' own forward, compiled; layers of one shape share the result, and so do trials of one shape."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        return [torch.compile(layer.forward, dynamic=True) for layer in self.layers]

    def scores(self, groups: Sequence[Group], known: Known | None = None) -> list[Tensor]:
        """Each group's logits: of each row (SEQ_CLS), else of each scored position, `(n, classes)`."""
        hidden = self.hidden(groups, known)
        if self.pooled:
            return list(hidden.split(self.layout.rows))
        return [self.head(scored) for scored in self.scored(hidden)]

    def scored(self, hidden: Tensor) -> list[Scored]:
        """Each group's positions that are scored."""
        found = []
        for k, (group, own) in enumerate(zip(self.layout.groups, hidden[0].split(self.layout.sizes), strict=True)):
            labels = group.targets(self.base.task == "CAUSAL_LM").to(own.device)
            where = (labels >= 0).nonzero()[:, 0]
            found.append(Scored(k, own.index_select(0, where), labels[where], where))
        return found

    def head(self, scored: Scored) -> Tensor:
        """The logits of positions, `(n, classes)`."""
        if not self.by_head:
            return scored.hidden  # they went through the head with all others
        sizes = [len(scored.hidden) if k == scored.group else 0 for k in range(len(self.layout.groups))]
        self._tell(sizes, 1, "scored")
        self._places = scored.places
        return self.model.get_output_embeddings()(scored.hidden[None])[0]

    def hidden(self, groups: Sequence[Group], known: Known | None = None) -> Tensor:
        """The pass itself: what the model gives out, or for language models what goes into their output layer."""
        self.layout = layout = lay_out(groups, self.depth, self.pooled, self.base.device)
        self._known = known or unknown
        inputs = {**layout.inputs, "position_ids": layout.inputs["position_ids"] + self._first_position}
        self._tell(layout.sizes, 1, "all")
        with ExitStack() as after:
            if not CURRENT or CURRENT[-1] is not self:
                after.enter_context(self.ready())
            if any(group.virtual is not None for group in groups):
                after.callback(self._admit_virtual().remove)
            if self.pooled and self.reads_last:
                return self.model.score(self.model.base_model(**inputs).last_hidden_state[:, 0])
            if self.by_head:
                return self.model.base_model(**inputs).last_hidden_state
            return self.model(**inputs).logits

    def forget(self) -> None:
        """Let go of what the last pass was made of."""
        for name in ("layout", "_stage", "_places"):
            vars(self).pop(name, None)

    def activations(self, group: Group, layer: int, known: Known | None = None) -> Tensor:
        """What enters a layer (`depth`: what leaves the last) for each token of a group, `(tokens, width)`; after all
        layers, where one position is read, for each row."""
        self._goal = layer
        try:
            self.hidden([group], known)
        except Reached as reached:
            return reached.args[0]
        finally:
            self._goal = None
        raise AssertionError("a pass ends at its goal")

    # ---------------------------------------------------------------- inputs

    @functools.cached_property
    def _first_position(self) -> int:
        """RoBERTa and its kin count from the padding token's id on."""
        embeddings: Any = getattr(self.model.base_model, "embeddings", None)
        return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0

    def _admit_virtual(self) -> Any:
        """Put virtual tokens in the place of those that were embedded for them."""
        start, places, rows = 0, [], []
        for group, came, size in zip(self.layout.groups, self.layout.came, self.layout.sizes, strict=True):
            if group.virtual is not None:
                lengths = group.lengths[came]
                firsts = start + lengths.cumsum(0) - lengths
                places.append((firsts[:, None] + torch.arange(group.before)).flatten())
                rows.append(group.virtual.repeat(len(lengths), 1))
            start += size
        where, virtual = torch.cat(places).to(self.base.device), torch.cat(rows)

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.index_copy(1, where, virtual.to(output.dtype)[None])

        return self.model.get_input_embeddings().register_forward_hook(replace)

    # ---------------------------------------------------------------- layers

    def _tell(self, sizes: list[int], dim: int, what: str) -> None:
        """What is computed from here on: how much of each group, along which dimension, and which positions."""
        self._what = what
        if self.bank is not None:
            self.bank.sizes, self.bank.dim = sizes, dim

    def _run_layer(
        self, i: int, layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layout = self.layout
        if i >= layout.first:
            if i in layout.stages:
                hidden = self._enter(layout.stages[i], hidden)
            if i == self._goal:
                raise Reached(hidden[0])
            compute = functools.partial(self._compute, i, layer, forward, args, kwargs)
            again = self.checkpointing and torch.is_grad_enabled()
            hidden = checkpoint(compute, hidden, use_reentrant=False) if again else compute(hidden)
        return hidden if i + 1 < self.depth else self._leave(hidden)

    def _compute(
        self, i: int, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, hidden: Tensor
    ) -> Tensor:
        self._stage = stage = self.layout.stage(i)
        self._tell(stage.sizes, 1, "stage")
        if stage.present is not None:
            kwargs = {name: self._of_present(value, stage.present) for name, value in kwargs.items()}
        if i + 1 == self.depth and self.pooled and has_bert_attention(layer):
            return self._last_of_bert(layer, hidden, stage)
        out = forward(hidden, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _of_present(self, value: Any, present: Tensor) -> Any:
        """What a model computes once for all tokens, such as rotary embeddings, for those that are there."""
        if isinstance(value, tuple):
            return tuple(self._of_present(part, present) for part in value)
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == sum(self.layout.sizes):
            return value.index_select(1, present)
        return value

    def _enter(self, stage: Stage, hidden: Tensor) -> Tensor:
        """Let the rows in that enter here."""
        if stage.layer == 0:
            return hidden if stage.present is None else hidden.index_select(1, stage.present)
        pairs = zip(self.layout.groups, stage.entering, strict=True)
        there = [] if stage.layer == self.layout.first else [hidden[0]]
        there += [self._known(group, stage.layer, rows).to(hidden) for group, rows in pairs if len(rows)]
        hidden = (there[0] if len(there) == 1 else torch.cat(there))[None]
        return hidden if stage.order is None else hidden.index_select(1, stage.order)

    def _leave(self, hidden: Tensor) -> Tensor:
        """After the last layer: the position that is read of each row `(rows, 1, width)`, or all tokens."""
        layout = self.layout
        if not self.pooled:
            if self.depth in layout.stages:
                hidden = self._enter(layout.stages[self.depth], hidden)
            if self._goal == self.depth:
                raise Reached(hidden[0])
            self._tell(layout.sizes, 1, "all")
            return hidden
        parts = []
        if layout.stages:
            stage = layout.stage(self.depth)
            if not has_bert_attention(self.layers[-1]):
                lasts = stage.firsts + stage.lengths.to(stage.firsts) - 1
                hidden = hidden.index_select(1, lasts if self.reads_last else stage.firsts)
            parts.append(hidden[0])
        if self._goal == self.depth:
            raise Reached(parts[0])
        for group, came in zip(layout.groups, layout.came, strict=True):
            late = (~came).nonzero()[:, 0]
            if len(late):
                parts.append(self._known(group, self.depth, late).to(hidden))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = out if layout.row_order is None else out.index_select(0, layout.row_order)
        self._tell(layout.rows, 0, "rows")
        return out[:, None]

    def _last_of_bert(self, layer: Any, hidden: Tensor, stage: Stage) -> Tensor:
        """BERT's last layer where only the first position of each row is read: it alone asks, all tokens answer."""
        attention = layer.attention
        own = attention.self
        firsts = hidden.index_select(1, stage.firsts)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2)

        keys, values = heads(own.key(hidden)), heads(own.value(hidden))
        self._tell(stage.rows, 1, "firsts")
        out, _ = packed_attention(own, heads(own.query(firsts)), keys, values, None, scaling=own.scaling)
        attended = attention.output(out.flatten(2), firsts)
        return layer.feed_forward_chunk(attended)

    # ---------------------------------------------------------------- dropout

    def positions(self, k: int) -> Tensor:
        """Where what is being computed of a group stands among all tokens of its batch."""
        group, came = self.layout.groups[k], self.layout.came[k]
        lengths = group.lengths
        starts = lengths.cumsum(0) - lengths if group.starts is None else group.starts
        if self._what == "rows":
            return starts + (lengths - 1 if self.reads_last else 0)
        if self._what == "scored":
            return ranges(starts, lengths)[self._places.to(starts.device)]
        if self._what != "all":
            came = came & (group.entry <= self._stage.layer)
        return starts[came] if self._what == "firsts" else ranges(starts[came], lengths[came])


CURRENT: list[Packed] = []  # the innermost pass; attention functions are global in transformers


def unknown(group: Group, layer: int, rows: Tensor) -> Tensor:
    raise AssertionError("no row of this pass enters late")


def transformer_layers(model: Any) -> Any:
    """The model's one stack of layers; () if it has none or several."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return stacks[0] if len(stacks) == 1 else ()


def has_bert_attention(layer: Any) -> bool:
    """Whether a layer is built as BERT's, under the same names."""
    own = getattr(getattr(layer, "attention", None), "self", None)
    return all(hasattr(own, name) for name in ("query", "key", "value", "attention_head_size")) and hasattr(
        layer, "feed_forward_chunk"
    )


# -------------------------------------------------------------------- attention


@torch.compiler.disable
def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence: `(1, heads, tokens, width)` to `(1, tokens, heads, width)`.

    On the CPU in float32 also for half precision, whose backward pass is many times slower there.
    """
    current = CURRENT[-1]
    stage, one_asks = current._stage, current._what == "firsts"
    causal = bool(getattr(module, "is_causal", False))
    window = kwargs.get("sliding_window")
    if window is not None and int(stage.lengths.max()) > window:
        raise NotImplementedError("sliding windows shorter than the sequences")
    dtype = query.dtype
    precise = torch.float32 if current.base.kind == "cpu" else dtype
    buckets = stage.buckets
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    keys, values = (Pad.apply(t, buckets.padded, buckets.places) for t in (key, value))
    if one_asks:
        asking, widths = query.index_select(0, buckets.order), [1] * len(buckets.each)
    else:
        asking, widths = Pad.apply(query, buckets.padded, buckets.places), [bucket.length for bucket in buckets.each]
    asked = [bucket.rows * width for bucket, width in zip(buckets.each, widths, strict=True)]
    there = [bucket.rows * bucket.length for bucket in buckets.each]
    parts = []
    for bucket, *own in zip(buckets.each, asking.split(asked), keys.split(there), values.split(there), strict=True):
        q, k, v = (t.to(precise).unflatten(0, (bucket.rows, -1)).transpose(1, 2) for t in own)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else bucket.mask,
            is_causal=causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(0, 1).to(dtype))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = out.index_select(0, buckets.back) if one_asks else Unpad.apply(out, buckets.places)
    return out[None], None


AttentionInterface.register(ATTENTION, packed_attention)


class Pad(torch.autograd.Function):
    """Tokens at the places of padded sequences. Nothing goes back from where a sequence has ended: attention does not
    look there, and what it gives there `Unpad` leaves out."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class Unpad(torch.autograd.Function):
    """The reverse of `Pad`. As indexing alone it would cost ten times as much to derive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None
