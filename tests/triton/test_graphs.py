"""Launches as CUDA graphs: which calls are captured, replayed, or left as they are. A GPU's own are in tests/triton."""

import pytest
import torch

from psa_diffusers.gpu import graphs


@pytest.fixture
def log(monkeypatch):
    """What happens, in order: "made n" and "replayed n" of graph n; tests add the launches."""
    happened = []

    class Replay:
        def __init__(self, number: int) -> None:
            self.number = number

        def replay(self) -> None:
            happened.append(f"replayed {self.number}")

    def capture(device, enqueue):
        number = sum(entry.startswith("made") for entry in happened)
        happened.append(f"made {number}")
        return Replay(number)

    monkeypatch.setattr(graphs, "_capture", capture)
    return happened


def runs(of: graphs.Graphs, log: list, *addresses: int) -> list[str]:
    log.clear()
    for address in addresses:
        of.run(address, torch.device("cpu"), lambda: log.append("launched"))
    return log


def test_a_graph_is_made_at_the_second_call_and_replayed_from_then_on(log):
    assert runs(graphs.Graphs(), log, 1, 1, 1, 2, 1) == [
        *("launched", "made 0", "replayed 0", "replayed 0", "launched", "replayed 0")
    ]


def test_graphs_of_no_use_are_not_made_for_ever(log):
    of = graphs.Graphs()
    pairs = [address for address in range(20) for _ in range(2)]  # each comes twice, and never again
    assert runs(of, log, *pairs).count("launched") == 20 + 16
    assert sum(entry.startswith("made") for entry in log) == 4
    assert runs(of, log, 0) == ["replayed 0"]
    assert runs(of, log, 19)[0] == "made 0", "one that was of use pays for more"


def test_layers_whose_addresses_come_again_at_each_step_are_replayed_before_long(log):
    of, layers = graphs.Graphs(), range(100)
    for _ in range(6):
        runs(of, log, *layers)
    assert [entry.split()[0] for entry in runs(of, log, *layers)] == ["replayed"] * 100


def test_the_addresses_that_came_last_are_known(log, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_KEYS", 3)
    of = graphs.Graphs()
    runs(of, log, 1, 1, 1, 2, 3, 1, 4)
    assert runs(of, log, 1) == ["replayed 0"]
    assert runs(of, log, 2) == ["launched"], "forgotten"


def test_no_graph_inside_a_graph_or_where_it_is_switched_off(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs, "ENABLED", True)
    assert graphs.may_capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs.may_capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs, "ENABLED", False)
    assert not graphs.may_capture()
