"""Which linear layers a sketch can be made of, found by one tiny pass through the model; works without weights (meta device).

A layer's gradient is the sum over its calls of delta_t x_t^T, so a sketch of it is right when all uses of its weight are
calls of the layer, gradients reach it, and the batch's rows can be told apart in what it is given. None of this can be read
off a module: state-space models multiply by a layer's weight without calling it, routers pack tokens, indexers choose
without a gradient, encoders of images are not run on text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from schemas.errors import first_line
from stages.gradients.experts import experts_as
from stages.models.text_model import backbone

ROWS, TOKENS = 3, 11
"""Of the pass: no width of a model, so that a shape says what its dimensions are."""


class Unprobed(ValueError):
    """The pass cannot be made, on the meta device for a model whose operations depend on values."""


def by_row(value: Tensor, rows: int, tokens: int) -> Tensor | None:
    """[B, places, width] of what a layer was given for B rows of T tokens; None when its rows cannot be told apart.

    Rows first with any places in them ([B, T, W], [B, heads, T, W], [B, W]), or tokens of one row after those of another
    ([B * T, W], [B * T, heads, W]).
    """
    if value.dim() >= 2 and value.shape[0] in (rows, rows * tokens):
        return value.reshape(rows, -1, value.shape[-1])
    return None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient of any weight; both as before afterwards."""
    training = model.training
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        model.train(training)


class Leaves:
    """What the graph of a pass hangs on while the weights are frozen: the embeddings' output, and every sketched layer's
    output that has no gradient of its own (a branch that starts from other embeddings)."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def clear(self) -> None:
        self.tensors.clear()

    def open(self, output: Tensor) -> Tensor:
        """`output` with a gradient; as it is where the model itself wants none (no_grad)."""
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        leaf = output.detach().requires_grad_(True)
        self.tensors.append(leaf)
        return leaf.clone()  # a model may go on in place


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a linear layer's call."""
    value: Tensor = args[0] if args else kwargs["input"]
    return value


class _OtherUses(TorchFunctionMode):
    """Names of the layers whose weight something else than their own call computed with."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.owners, self.found = owners, set[str]()
        self.calling: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):
            for value in tree_leaves((args, kwargs)):
                name = self.owners.get(id(value)) if isinstance(value, Tensor) else None
                if name is not None and not self.calling[name]:
                    self.found.add(name)
        return result


def unsketchable(model: PreTrainedModel, layers: Mapping[str, list[nn.Module]]) -> dict[str, str]:
    """Why each of these layers cannot be sketched, by name; those that can are not in it.

    layers: name -> the linear modules that share its weight. Raises Unprobed when the pass fails.
    """
    owners = {id(modules[0].weight): name for name, modules in layers.items()}
    uses, leaves = _OtherUses(owners), Leaves()
    called, mixed, reached = set[str](), dict[str, tuple[int, ...]](), set[str]()
    with ExitStack() as entered:

        def hear(name: str, module: nn.Module) -> None:
            def before(module: nn.Module, args: Any) -> None:
                uses.calling[name] += 1

            def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
                uses.calling[name] -= 1
                called.add(name)
                for value in (given(args, kwargs), output):
                    if by_row(value, ROWS, TOKENS) is None:
                        mixed[name] = tuple(value.shape)
                output = leaves.open(output)
                if output.requires_grad:
                    output.register_hook(lambda delta: reached.add(name))
                return output

            entered.callback(module.register_forward_pre_hook(before).remove)
            entered.callback(module.register_forward_hook(after, with_kwargs=True).remove)

        for name, modules in layers.items():
            for module in modules:
                hear(name, module)
        _pass(model, leaves, uses, entered)
    reasons: dict[str, str] = {}
    for name in layers:
        if name not in called:
            reasons[name] = "is not called when the model reads text"
        elif name in uses.found:
            reasons[name] = "has a weight that is also used outside of its calls"
        elif name in mixed:
            reasons[name] = (
                f"gets input of shape {mixed[name]} for {ROWS} rows of {TOKENS} tokens: its rows cannot be told apart"
            )
        elif name not in reached:
            reasons[name] = "gets no gradient"
    return reasons


def _pass(model: PreTrainedModel, leaves: Leaves, uses: _OtherUses, entered: ExitStack) -> None:
    """One tiny forward and backward pass."""
    embeddings, base = model.get_input_embeddings(), backbone(model)
    device = next(embeddings.parameters()).device
    if device.type == "meta":  # transformers asks real tensors for their values, to make masks
        entered.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    entered.callback(embeddings.register_forward_hook(lambda module, args, output: leaves.open(output)).remove)
    entered.enter_context(frozen(model))
    if device.type == "meta" and model._can_set_experts_implementation():  # the others read which experts were chosen
        entered.enter_context(experts_as(base, "batched_mm"))
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(ROWS * TOKENS, device=device).view(ROWS, TOKENS) % vocabulary
    try:
        with torch.enable_grad():
            with uses:
                hidden_BTH = base(input_ids=ids_BT, use_cache=False, return_dict=True).last_hidden_state
            torch.autograd.grad(hidden_BTH.square().sum(), leaves.tensors, allow_unused=True)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        NotImplementedError,
        ImportError,
    ) as error:
        raise Unprobed(f"{type(model).__name__} cannot be run on text: {first_line(error)}") from error
