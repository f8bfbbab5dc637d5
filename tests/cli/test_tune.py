"""psa-tune: a file that the other commands read, that says what it is for, and refusals that say what to do."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from psa_diffusers.cli.errors import run_command
from psa_diffusers.cli.tune import app
from psa_diffusers.config import PSAConfig

PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def psa_tune(capsys, saved_model, tmp_path):
    def run(*arguments, model=saved_model, output=tmp_path / "tuned.yaml"):
        capsys.readouterr()
        words = [*arguments, "--model", model, "--output", output]
        return run_command("psa-tune", app, [str(word) for word in words]), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tuned(saved_model, tmp_path_factory):
    """The file of two runs of four steps."""
    folder = tmp_path_factory.mktemp("tuned")
    prompts, file = folder / "prompts.txt", folder / "tuned.yaml"
    prompts.write_text("a red circle\na blue square moves left\n")
    words = ["--prompts-file", prompts, "--model", saved_model, "--compute-budget", 0.3, "--output", file, "--quiet"]
    assert run_command("psa-tune", app, [str(word) for word in words]) == 0
    return file


def test_the_file_says_what_it_is_for(tuned, saved_model):
    values = yaml.safe_load(tuned.read_text())
    assert set(values) == {"description", "calibrated", "config"}
    facts = values["calibrated"]
    assert facts["model"]["name"] == str(saved_model) and "weights_sha256" in facts["model"]
    assert (facts["steps"], facts["num_frames"], facts["height"], facts["width"]) == (4, 5, 64, 64)
    assert facts["prompts"] == ["a red circle", "a blue square moves left"] and facts["measured_in"] == [0]
    assert {"psa_diffusers", "torch", "diffusers"} <= set(facts["versions"])
    assert 0 < facts["predicted_error"] <= facts["uniform_error"] < 1
    assert "4 steps" in values["description"] and "0.3" in values["description"]


def test_its_budgets_have_the_mean_that_was_asked_for(tuned):
    config = PSAConfig.load(tuned)
    assert config.compute_budget == 0.3 and [point.at for point in config.budget_schedule] == [0.25, 0.5, 0.75]
    budgets = [budget for point in config.budget_schedule for budget in point.budget]
    assert len(budgets) == 3 * 2 and sum(budgets) / len(budgets) == pytest.approx(0.3, rel=1e-3)


def test_psa_generate_follows_it(tuned, psa_generate, saved_model, tmp_path):
    run = psa_generate(*PROMPT, "--model", saved_model, "--config", tuned, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.err
    schedule = PSAConfig.load(tuned).budget_schedule
    assert run.json["config"]["budget_schedule"] == [point.to_dict() for point in schedule]
    assert [step for step, _ in run.json["compute_budget_by_step"]] == [1, 2, 3]


def test_a_run_of_another_kind_is_remarked_on(tuned, psa_generate, saved_model, tmp_path):
    model = ("--model", saved_model, "--config", tuned)
    same = psa_generate(*PROMPT, *model, "--output", tmp_path / "a")
    assert "calibrated" not in same.err
    other = psa_generate(*PROMPT, *model, "--steps", 5, "--height", 80, "--output", tmp_path / "b")
    assert other.code == 0 and "was calibrated for height 64, steps 4; this run has height 80, steps 5" in other.err


def test_psa_compare_follows_it_beside_one_budget_for_all(tuned, psa_compare, saved_model, tmp_path):
    """The page has the compute budget of every step and layer; a run of another kind is remarked on, there too."""
    given = (*PROMPT, "--model", saved_model, "--config", tuned, "--compute-budget", 0.3, "--output", tmp_path / "out")
    run = psa_compare(*given)
    assert run.code == 0 and "calibrated" not in run.err, run.err
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("[bt]*.json"))]
    one, own = ({(step, layer): budget for step, layer, budget in record["by_call"]} for record in records)
    given_budgets = {
        (round(point.at * 4), layer): budget
        for point in PSAConfig.load(tuned).budget_schedule
        for layer, budget in enumerate(point.budget)
    }
    for found, expected in ((own, given_budgets), (one, dict.fromkeys(given_budgets, 0.3))):
        sparse = {key: budget for key, budget in found.items() if key[0]}  # step 0 is dense
        assert sparse == pytest.approx(expected, abs=0.02)  # of so few block pairs one costs that much
    with (tmp_path / "out" / "clips.csv").open(newline="") as file:
        asked = {row["setting"]: row["compute_budget_asked"] for row in csv.DictReader(file)}
    assert asked == {"dense": "", "tuned": "", "budget-0.3": "0.3"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tuned" in page and "budget_schedule" in page
    other = psa_compare(*given[:-1], tmp_path / "other", "--steps", 2)
    remark = "was calibrated for steps 4; this run has steps 2"
    assert other.code == 0 and remark in other.err
    assert remark in (tmp_path / "other" / "report.html").read_text()


def test_words_and_json_say_the_same(psa_tune, tmp_path):
    code, out, _ = psa_tune(*PROMPT, "--quiet", "--json")
    found = json.loads(out)
    assert code == 0 and found["file"] == str(tmp_path / "tuned.yaml")
    assert found["config"] == PSAConfig.load(found["file"]).to_dict()
    code, out, err = psa_tune(*PROMPT, output=tmp_path / "b.yaml")
    assert code == 0 and f"--config {tmp_path / 'b.yaml'}" in out and "run 1 of 1" in err
    assert "with one budget for all" in out


def test_a_target_error_is_checked_in_a_run_of_its_own(psa_tune, tmp_path):
    code, out, err = psa_tune(*PROMPT, "--target-error", "0.08")
    values = yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    facts, config = values["calibrated"], PSAConfig.load(tmp_path / "tuned.yaml")
    assert code == 0 and facts["target_error"] == 0.08 and "check 1 of 1" in err
    assert facts["measured_error"] == pytest.approx(0.08, rel=0.15)
    assert f"the total error was {facts['measured_error']:.4f}; wanted was 0.08" in out and "total error 0.08" in out
    assert config.target_error is None
    budgets = [budget for point in config.budget_schedule for budget in point.budget]
    assert sum(budgets) / len(budgets) == pytest.approx(config.compute_budget, rel=1e-3)


def test_layers_have_budgets_of_their_own_only_on_request(psa_tune, tmp_path):
    for options, alike in ((), True), (("--by-layer",), False):
        assert psa_tune(*PROMPT, "--compute-budget", "0.6", "--overwrite", "--quiet", *options)[0] == 0
        schedule = PSAConfig.load(tmp_path / "tuned.yaml").budget_schedule
        assert all(len(set(point.budget)) == 1 for point in schedule) == alike


@pytest.mark.parametrize(("runs", "kept"), [([0.1, 0.052], 0.052), ([0.1, 0.3], 0.1), ([0.051], 0.051)])
def test_what_is_wanted_is_corrected_once_by_what_the_run_erred(psa_tune, tmp_path, monkeypatch, runs, kept):
    """And only where that is off, and the correction is nearer."""
    from psa_diffusers.cli import tuning
    from psa_diffusers.integration import calibrating

    found, wanted, together = iter(runs), [], calibrating.tune_together
    monkeypatch.setattr(tuning, "_measure_total", lambda *given, **more: next(found))
    monkeypatch.setattr(calibrating, "tune_together", lambda *given: wanted.append(given[4]) or together(*given))
    assert psa_tune(*PROMPT, "--target-error", "0.05", "--quiet")[0] == 0
    assert wanted == ([0.05, pytest.approx(0.025)] if len(runs) > 1 else [0.05])
    facts = yaml.safe_load((tmp_path / "tuned.yaml").read_text())["calibrated"]
    assert facts["measured_error"] == kept


def test_an_existing_file_stays_unless_overwrite(psa_tune, tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("mine")
    code, _, err = psa_tune(*PROMPT)
    assert code == 2 and "Add --overwrite" in err and file.read_text() == "mine"
    assert psa_tune(*PROMPT, "--overwrite", "--quiet")[0] == 0 and PSAConfig.load(file)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--preset", "psa-3"),
            "psa-tune sets the budgets of rule: budget itself, but the settings have rule: topk",
        ),
        (("--compute-budget", "2"), "--compute-budget must be in (0, 1]"),
        (("--compute-budget", "0.3", "--target-error", "0.1"), "give --compute-budget or --target-error, not both"),
        (("--target-error", "1.5"), "target_error must be a relative error in (0, 1)"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--prompts-file", "none.txt"), "give either --prompt"),
    ],
)
def test_wrong_usage(psa_tune, arguments, says, tmp_path):
    code, out, err = psa_tune(*PROMPT, *arguments)
    assert code == 2 and says in err and out == "" and not (tmp_path / "tuned.yaml").exists()


def test_a_file_of_another_kind(psa_tune, tmp_path):
    code, _, err = psa_tune(*PROMPT, output=tmp_path / "tuned.json")
    assert code == 2 and "--output must end in .yaml" in err


def test_settings_that_have_a_schedule_already(psa_tune, tuned):
    code, _, err = psa_tune(*PROMPT, "--config", tuned)
    assert code == 2 and "a budget_schedule already" in err


def test_a_run_without_sparse_steps(psa_tune, tmp_path):
    code, _, err = psa_tune(*PROMPT, "--steps", 1)
    assert code == 1 and "nothing was measured" in err and "lower dense_warmup" in err
    assert not (tmp_path / "tuned.yaml").exists()
