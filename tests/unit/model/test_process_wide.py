"""Settings of the whole process are restored however the contexts of several threads overlap."""

import pytest
import torch
import torch._dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimprobe.engines.curvature.double_backward import use_differentiable_attention
from fimprobe.engines.spot_checks.shifted_forward import _EXACT_KERNELS
from fimprobe.model.process_wide import ProcessWide
from fimprobe.model.user_run import _without_compilation

SETTINGS = {
    "compilation": (_without_compilation, lambda: torch._dynamo.eval_frame._stance.stance),
    "attention": (use_differentiable_attention, torch.backends.cuda.flash_sdp_enabled),
    "kernels": (_EXACT_KERNELS.changed, torch.backends.mha.get_fastpath_enabled),
}


def overlap(make_context, read):
    """What is set before, inside of the first of two contexts, after its end, and after both."""
    before = read()
    first, second = make_context(), make_context()
    first.__enter__()
    second.__enter__()
    inside = read()
    first.__exit__(None, None, None)
    after_first = read()
    second.__exit__(None, None, None)
    return before, inside, after_first, read()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_of_overlapping_contexts_restores(name):
    before, inside, after_first, after = overlap(*SETTINGS[name])
    assert inside == after_first != before == after


def test_without_it_the_process_would_keep_the_change():
    """Each context restores what it saw: what ``ProcessWide`` is there for."""
    read = torch.backends.cuda.flash_sdp_enabled
    before, _, _, after = overlap(lambda: sdpa_kernel(SDPBackend.MATH), read)
    torch.backends.cuda.enable_flash_sdp(before)
    torch.backends.cuda.enable_mem_efficient_sdp(before)
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert before and not after


def test_an_error_inside_and_one_of_the_setting_leave_nothing():
    read = torch.backends.mha.get_fastpath_enabled
    before = read()
    with pytest.raises(KeyError), _EXACT_KERNELS.changed():
        raise KeyError
    assert read() == before

    def fail():
        raise RuntimeError("no such setting")

    broken = ProcessWide(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such setting"), broken.changed():
            pass
