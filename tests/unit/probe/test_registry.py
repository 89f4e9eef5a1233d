"""The probes that are left when the interpreter ends."""

import os

import fimprobe
from fimprobe.probe import registry
from tests.models.small import mlp
from tests.support.loop import KNOWN


def test_only_the_process_that_attached_a_probe_detaches_it(monkeypatch):
    monkeypatch.setattr(registry, "_probes", {})
    net = mlp()
    probe = fimprobe.attach(net, KNOWN)
    process_id = os.getpid()
    monkeypatch.setattr(registry.os, "getpid", lambda: process_id + 1)
    registry._detach_all()
    assert not probe.detached and registry.find_probe(net) is probe
    monkeypatch.setattr(registry.os, "getpid", lambda: process_id)
    registry._detach_all()
    assert probe.detached and registry.find_probe(net) is None


def test_an_earlier_probe_does_not_unregister_a_later_one(monkeypatch):
    monkeypatch.setattr(registry, "_probes", {})
    net = mlp()
    first = fimprobe.attach(net, KNOWN)
    key = registry.model_key(net)
    second = fimprobe.attach(net, KNOWN)
    registry.unregister(key, first)
    assert registry.find_probe(net) is second
    second.detach()
