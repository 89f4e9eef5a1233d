"""Numbers of torch operations: on a GPU each takes its launch, whatever the width of the model."""

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fimprobe
from fimprobe.engines.tracing.plan import Plan


class CountOperations(TorchDispatchMode):
    """Counts the operations inside the context."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(run):
    with CountOperations() as operations:
        run()
    return operations.count


def operations(layers, **options):
    """(Operations of a measurement, and of the model's own forward and backward)."""
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=8, n_head=2, vocab_size=11, n_positions=8, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(11, (8, 6))
    own = count(lambda: model(input_ids=tokens, labels=tokens).loss.backward())
    plan = Plan()

    def measure(seed):
        inputs = {"input_ids": tokens}
        likelihood = {"likelihood": "categorical", "bounds": False}
        fimprobe.measure(model, inputs, seed=seed, plan=plan, **likelihood, **options)

    for seed in range(4):  # later ones know the plan, and compare single samples only now and then
        measure(seed)
    return count(lambda: measure(4)), own


def operations_of_a_layer(layers, **options):
    """Operations of each layer more, over those of its own forward and backward."""
    (few, own_few), (more, own_more) = (operations(n, **options) for n in (1, layers))
    return (more - few) / (own_more - own_few)


def test_a_layer_takes_few_operations():
    assert operations_of_a_layer(2, estimators=("i1",), draws=1) <= 2.3


def test_second_order_takes_few_operations():
    options = {"estimators": ("i1", "i2"), "second_order": "spot_checks", "draws": 2}
    assert operations_of_a_layer(3, **options) <= 15
