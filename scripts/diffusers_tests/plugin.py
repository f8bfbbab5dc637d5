"""A pytest plugin: every transformer that PSA knows is made with PSA enabled, and what ran is counted.

Used by run.py, which says by the environment what to do: PSA_TESTS_ENABLE (0 or 1), and PSA_TESTS_REPORT, the JSON file
to write. The tests' sequences are short: blocks are tiny, and at a compute budget of 1 the sparse path computes what
dense attention does, to rounding, so that the tests can be passed.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path

import diffusers  # here, before the checkout's conftest.py puts its own on the path
from inputs import amend_cosmos, amend_minimax_h3

CONFIG = {
    "query_block_size": 8,
    "kv_block_size": 4,
    "num_levels": 2,
    "compute_budget": float(os.environ.get("PSA_TESTS_BUDGET", "1.0")),
    "dense_warmup": 0.0,
}

outcomes: dict[str, str] = {}
sparse_calls: Counter[str] = Counter()  # by test
dense_calls: Counter[str] = Counter()  # by reason
_running = ""


def pytest_collection_finish(session) -> None:
    amend_minimax_h3({part for item in session.items for part in getattr(item.cls, "__mro__", ())})


def pytest_configure(config) -> None:
    amend_cosmos()
    if os.environ["PSA_TESTS_ENABLE"] == "1":
        from psa_diffusers.integration.models import known_transformers

        for name in known_transformers():
            _enable_when_made(getattr(diffusers, name, None))
        _count()


def _enable_when_made(model_class) -> None:
    if model_class is None:  # this diffusers does not have it
        return
    make = model_class.__init__

    @functools.wraps(make)
    def made(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        if type(self).__init__ is made:
            _enable(self)

    model_class.__init__ = made


def _enable(model) -> None:
    from psa_diffusers import PSAConfig, enable_psa
    from psa_diffusers.integration.processor import installed_processors

    enable_psa(model, PSAConfig(**CONFIG))
    for processor in installed_processors([model]):
        # No pipeline says which step runs: it is always the only one. Left open, hence kept.
        step = processor.step(0, 1)
        step.__enter__()
        model.__dict__["_psa_tests_step"] = step


def _count() -> None:
    from psa_diffusers.integration.statistics import PSAStatistics

    count_sparse, count_dense = PSAStatistics.count_sparse, PSAStatistics.count_dense

    def sparse(self, *args, **kwargs) -> None:
        sparse_calls[_running] += 1
        count_sparse(self, *args, **kwargs)

    def dense(self, reason: str, calls: int = 1, **more) -> None:
        dense_calls[reason] += calls
        count_dense(self, reason, calls, **more)

    PSAStatistics.count_sparse, PSAStatistics.count_dense = sparse, dense


def pytest_runtest_logstart(nodeid: str, location) -> None:
    global _running
    _running = nodeid


def pytest_runtest_logreport(report) -> None:
    # One word a test: the call's, unless setup or teardown did not pass.
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session, exitstatus) -> None:
    found = {"outcomes": outcomes, "sparse_calls": dict(sparse_calls), "dense_calls": dict(dense_calls)}
    Path(os.environ["PSA_TESTS_REPORT"]).write_text(json.dumps(found, indent=1))
