"""The table of the estimators names what options, fields and records have."""

import dataclasses

import torch
from torch import nn

import fimprobe
from fimprobe.estimators.estimate import Estimate, GroupEstimates
from fimprobe.estimators.names import ESTIMATORS, KEYS, LAYER_KEYS, RECORD_KEYS, UNBIASED_KEYS


def test_every_key_is_an_option_a_field_and_a_key_of_the_record():
    labels = torch.tensor([0, 1, 2, 0])
    report = fimprobe.measure(
        nn.Linear(5, 3), torch.randn(4, 5), likelihood="categorical", estimators=KEYS, labels=labels
    )
    fields = [field.name for field in dataclasses.fields(GroupEstimates)]
    assert fields == ["numel", *RECORD_KEYS]
    layer = report.to_dict()["layers"]["(model)"]
    assert set(layer) <= set(fields) and set(KEYS) <= set(layer)
    assert all(isinstance(report.total.get(key), Estimate) for key in KEYS)
    for key in KEYS:
        pairs = f"fim/{key}/pairs_for_10_percent"
        assert f"fim/{key}/trace" in report.scalars()
        assert key in UNBIASED_KEYS or pairs not in report.scalars()


def test_keys_are_in_the_order_of_the_table():
    assert tuple(ESTIMATORS) == KEYS
    assert set(LAYER_KEYS) <= set(UNBIASED_KEYS) < set(KEYS)
