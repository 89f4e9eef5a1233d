"""Complex numbers inside of a model; complex trainable parameters and outputs are refused."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from tests.models.cases import Lambda
from tests.support.single_samples import assert_first_order, assert_second_order

pytestmark = pytest.mark.usefixtures("double")

COMPLEX = torch.complex128


def filtered(self, x):
    weight = torch.view_as_complex(self.w) if self.w.dim() == 2 else self.w
    return self.parts[0](torch.fft.irfft(torch.fft.rfft(x) * weight, n=4).tanh())


class Filter(nn.Module):
    """Complex numbers from a real parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return torch.fft.rfft(x) * torch.view_as_complex(self.weight)


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.real = nn.Parameter(torch.randn(3, 3))
        self.imaginary = nn.Parameter(torch.randn(3, 3))

    def forward(self, z):
        return z @ torch.complex(self.real, self.imaginary)


class Gate(nn.Module):
    """A bias of the modulus."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, z):
        return (z.abs() + self.bias).tanh() * torch.sgn(z)


def parts(z):
    return torch.view_as_real(z).flatten(1)


def chain():
    head = Lambda(lambda s, z: s.parts[0](parts(z)), nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(4, 4), Filter(), Mix(), Gate(), head)


def spectrum(self, x):
    return self.parts[1](torch.fft.fft2(self.parts[0](x)).real.mean(1))


MEASURED = {
    "a weight kept as two real ones": (
        lambda: Lambda(filtered, nn.Linear(4, 3), w=nn.Parameter(torch.randn(3, 2))),
        (4,),
    ),
    "a frozen complex weight": (
        lambda: Lambda(
            filtered, nn.Linear(4, 3), w=nn.Parameter(torch.randn(3, dtype=COMPLEX), False)
        ),
        (4,),
    ),
    "complex numbers between modules": (chain, (4,)),
    "a frozen complex layer between them": (
        lambda: chain().insert(2, nn.Linear(3, 3, dtype=COMPLEX).requires_grad_(False)),
        (4,),
    ),
    "real part of a transform": (lambda: Lambda(spectrum, nn.Linear(4, 4), nn.Linear(4, 3)), (2, 4)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_gradients(name):
    make, shape = MEASURED[name]
    assert_first_order(make(), (torch.randn(3, *shape),))


@pytest.mark.parametrize("name", ["complex numbers between modules", "real part of a transform"])
def test_second_derivatives(name):
    make, shape = MEASURED[name]
    assert_second_order(make(), (torch.randn(3, *shape),))


def test_complex_inputs():
    model = nn.Sequential(Mix(), Gate(), Lambda(lambda s, z: s.parts[0](parts(z)), nn.Linear(6, 3)))
    assert_first_order(model, (torch.randn(3, 3, dtype=COMPLEX),))


def test_complex_numbers_of_single_precision():
    """Gradients that pass through complex64 are compared as those that pass through float32."""

    def forward(self, x):
        return self.parts[1]((self.parts[0](x).to(torch.complex64) * 1j).real.double())

    model = Lambda(forward, nn.Linear(4, 4), nn.Linear(4, 3))
    assert_first_order(model, (torch.randn(3, 4),), tolerance=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lambda(filtered, nn.Linear(4, 3), w=nn.Parameter(torch.randn(3, dtype=COMPLEX))),
        lambda: nn.Sequential(nn.Linear(4, 3, dtype=COMPLEX), Lambda(lambda s, z: z.abs())),
    ],
)
def test_complex_parameters_are_refused(make):
    with pytest.raises(FimprobeError, match="must have real trainable parameters, got .* complex.*"):
        fimprobe.measure(make(), torch.randn(3, 4), likelihood="categorical")


def test_complex_outputs_are_refused():
    with pytest.raises(FimprobeError, match="the outputs must be real, got complex128 .*`output`"):
        fimprobe.measure(nn.Sequential(Filter()), torch.randn(3, 4), likelihood="categorical")
