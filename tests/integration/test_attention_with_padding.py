"""torch's attention layers with padding and masks, in the way that training computes them."""

import copy

import pytest
import torch
from torch import nn

from tests.models.cases import Lambda
from tests.support.single_samples import assert_first_order, assert_second_order

pytestmark = pytest.mark.usefixtures("double")

SIZE, LENGTH, HEADS = 3, 3, 2
PADDING = torch.tensor([[False, False, False], [False, False, True], [False, True, True]])


def sequences(length=LENGTH):
    return torch.randn(SIZE, length, 4)


def encoder(layers=1, **options):
    layer = nn.TransformerEncoderLayer(4, HEADS, 4, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers)


def attention(**options):
    return nn.MultiheadAttention(4, HEADS, batch_first=True, **options)


def encode_mean(self, x, padding):
    return self.parts[1](self.parts[0](x, src_key_padding_mask=padding).mean(1))


def encode_tokens(self, x, padding):
    return self.parts[1](self.parts[0](x, src_key_padding_mask=padding))


def masks_of_heads(padding):
    """[B·heads, T, T]."""
    return padding[:, None, None, :].expand(-1, HEADS, LENGTH, -1).reshape(-1, LENGTH, LENGTH)


def encode_masked(self, x, padding):
    return self.parts[1](self.parts[0](x, mask=masks_of_heads(padding)).mean(1))


def attend_padded(self, x, padding):
    return self.parts[1](self.parts[0](x, x, x, key_padding_mask=padding)[0].mean(1))


def attend_masked(self, x, padding):
    return self.parts[1](self.parts[0](x, x, x, attn_mask=masks_of_heads(padding))[0].mean(1))


def use_weights(self, x, padding):
    mixed, weights = self.parts[0](x, x, x, key_padding_mask=padding, average_attn_weights=False)
    return self.parts[1](mixed.mean(1) + weights.mean(2).flatten(1)[:, :4])


def attend_sample_by_sample(self, x, padding):
    return torch.stack([self.parts[1](self.parts[0](row, row, row)[0].mean(0)) for row in x])


MODELS = {
    "encoder, mean": (encode_mean, encoder),
    "encoder, gelu, norm first": (encode_mean, lambda: encoder(activation="gelu", norm_first=True)),
    "encoder, a mask for each head": (encode_masked, encoder),
    "attention, padding": (attend_padded, attention),
    "attention, a mask for each head": (attend_masked, attention),
    "attention, weights": (use_weights, attention),
    "attention, learned keys": (attend_padded, lambda: attention(add_bias_kv=True)),
    "attention, zero keys": (attend_padded, lambda: attention(add_zero_attn=True)),
    "attention, sample by sample": (attend_sample_by_sample, attention),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    forward, make = MODELS[name]
    assert_first_order(Lambda(forward, make(), nn.Linear(4, 2)), (sequences(), PADDING))


@pytest.mark.parametrize("name", ["encoder, gelu, norm first", "attention, a mask for each head"])
def test_second_derivatives(name):
    forward, make = MODELS[name]
    assert_second_order(Lambda(forward, make(), nn.Linear(4, 2)), (sequences(), PADDING))


def test_a_label_for_each_token():
    model = Lambda(encode_tokens, encoder(), nn.Linear(4, 2))
    assert_first_order(model, (sequences(), PADDING), positions=LENGTH)


@pytest.mark.parametrize("make", [encoder, lambda: encoder(activation="gelu")])
@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_encoder(make, training):
    """Frozen and in eval mode, it returns zeros at padded positions: not what training computes."""
    model = Lambda(encode_tokens, make().requires_grad_(False), nn.Linear(4, 2))
    model.parts[0].train(training)
    reference = copy.deepcopy(model)  # without dropout, training mode is the function that is trained
    assert_first_order(model, (sequences(), PADDING), reference=reference, positions=LENGTH)
    assert model.parts[0].use_nested_tensor


def test_decoder():
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    layer = nn.TransformerDecoderLayer(4, HEADS, 4, batch_first=True)

    def decode(self, x, memory, padding):
        hidden = self.parts[0](x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        return self.parts[1](hidden.mean(1))

    model = Lambda(decode, nn.TransformerDecoder(layer, 1), nn.Linear(4, 2))
    assert_first_order(model, (sequences(2 * LENGTH)[:, :LENGTH], sequences(), PADDING))


def test_whole_transformer():
    transformer = nn.Transformer(4, HEADS, 1, 1, 4, batch_first=True)
    model = Lambda(lambda s, x, y: s.parts[1](s.parts[0](x, y).mean(1)), transformer, nn.Linear(4, 2))
    assert_first_order(model, (sequences(5), sequences()))
