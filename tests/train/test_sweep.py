"""Sweeps: the list of jobs, what is skipped, gone on with and told, and the table of all runs."""

import contextlib
import json

import pyarrow.csv
import pyarrow.parquet
import pytest

from tokred import viz
from tokred.__main__ import main as command
from tokred.train import sweep as module
from tokred.train.finished import claim
from tokred.train.sweep import Sweep, Trial, finished, list_jobs, load_sweep, main, run
from tokred.train.tidy import tidy, write_report

DIGITS = "configs/sweep/digits.py:smoke"
SMALL = Sweep(
    dense="configs/digits_dense.py:smoke",
    ratios=(0.5, 0.8),
    trials={
        "rates": Trial(
            "configs/digits_diffrate.py:smoke",
            "rates.target",
            (0.5, 0.8),
            ("train.steps=0", "start_from={dense}"),
        ),
        "predictors": Trial("configs/digits_dynamicvit.py:smoke"),
    },
    seeds=(0, 1),
)


def row(method: str, seed: int, **more) -> dict:
    return {"method": method, "seed": seed, "accuracy": 0.5, "macs": 8, "macs_ratio": 0.5} | more


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The workdirs that were trained in; nothing is."""
    done = []

    def train(config, workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").touch()
        done.append(str(workdir))
        learned = "diffrate" if config.rates.steps else config.train.method
        macs = config.model.depth
        methods = dict.fromkeys(("dense", learned, *config.evaluate.methods))
        return [row(m, config.seed, macs=macs if m == "dense" else macs // 2) for m in methods]

    def again(workdir, *, methods, ratio):
        return [row("dense", 0)] + [row(m, 0, keep=ratio) for m in methods]

    monkeypatch.setattr(module, "run_job", train)
    monkeypatch.setattr(module, "evaluate_job", again)
    return done


def jobs(tmp_path) -> list[module.Job]:
    return list(list_jobs(SMALL, tmp_path, SMALL.seeds))


def test_jobs_are_recipes_times_budgets_times_seeds(tmp_path):
    found = {job.name: job for job in jobs(tmp_path)}
    assert [name for name in found if name.endswith("seed_1")] == [
        "dense/seed_1",
        "smaller_dense/depth_3/seed_1",
        "smaller_dense/depth_2/seed_1",
        "rates/0.5/seed_1",
        "rates/0.8/seed_1",
        "predictors/seed_1",
    ]
    rates = found["rates/0.8/seed_1"].config
    assert (rates.rates.target, rates.seed) == (0.8, 1)
    assert rates.start_from == str(tmp_path / "dense" / "seed_1")
    assert found["smaller_dense/depth_3/seed_0"].config.model.depth == 3
    assert found["dense/seed_0"].config.evaluate.methods == module.BASELINES


def test_rows_bear_the_name_of_their_line(tmp_path, trained):
    found = {job.name: run(job) for job in jobs(tmp_path)}
    lines = lambda name: [(r["line"], r["budget"]) for r in found[name]]  # noqa: E731
    baselines = [(name, ratio) for ratio in (0.5, 0.8) for name in module.BASELINES]
    assert lines("dense/seed_0") == [("dense", None), *baselines]
    assert lines("smaller_dense/depth_2/seed_0") == [("smaller dense", 2)]
    assert lines("rates/0.8/seed_0") == [("rates", 0.8)]
    assert lines("predictors/seed_1") == [("predictors", None)]


def test_what_is_finished_is_not_trained_again(tmp_path, trained, capsys):
    job = jobs(tmp_path)[0]
    assert run(job) == run(job) == finished(job)
    assert len(trained) == 1
    job.config.train.steps += 1
    assert finished(job) is None


def test_a_half_written_run_is_told_and_done_again(tmp_path, trained, capsys):
    job = jobs(tmp_path)[0]
    rows = run(job)
    (tmp_path / job.name / "rows.json").unlink()
    assert run(job) == rows
    assert "dense/seed_0 was not finished" in capsys.readouterr().out
    assert len(trained) == 2


def test_a_table_of_all_runs(tmp_path, trained, capsys):
    arguments = [DIGITS, f"--workdir={tmp_path}", "--seeds=0"]
    main(arguments)
    out, err = capsys.readouterr()
    assert err == "" and "smaller dense 2" in out and "diffrate 0.65" in out
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert pyarrow.csv.read_csv(tmp_path / "results.csv").num_rows == len(table) == 18
    assert table[0]["line"] == "dense" and table[0]["macs_ratio"] == 1
    smaller = next(r for r in table if r["line"] == "smaller dense")
    assert smaller["macs_ratio"] == 0.75
    report = (tmp_path / "report.md").read_text()
    assert "sweep configs/sweep/digits.py:smoke" in report and "frontier.png" in report
    count = len(trained)
    main(arguments)
    assert len(trained) == count


def test_one_job_at_a_time(tmp_path, trained, capsys):
    main([DIGITS, f"--workdir={tmp_path}", "--seeds=0", "--jobs"])
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first[-1] == "--job=dense/seed_0"
    main(first[4:])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["line"] == "dense"
    main([DIGITS, f"--workdir={tmp_path}", "--seeds=0", "--collect"])
    out, err = capsys.readouterr()
    assert "diffrate/0.5/seed_0 is not finished" in err and "diffrate" not in out
    with pytest.raises(ValueError, match="no job 'dense/seed_7'"):
        main([DIGITS, f"--workdir={tmp_path}", "--job=dense/seed_7"])
    with pytest.raises(ValueError, match=r"goes on from .*dense/seed_1, which is not finished"):
        main([DIGITS, f"--workdir={tmp_path}", "--job=diffrate/0.5/seed_1"])


def test_one_job_waits_for_the_process_that_runs_it(tmp_path, trained, monkeypatch):
    arguments = [DIGITS, f"--workdir={tmp_path}", "--job=dense/seed_0"]
    with contextlib.ExitStack() as other:
        assert other.enter_context(claim(tmp_path / "dense" / "seed_0"))
        monkeypatch.setattr("tokred.train.finished.time.sleep", lambda _: other.close())
        main(arguments)
    assert len(trained) == 1
    main(arguments)
    assert len(trained) == 1


def test_runs_of_no_job_are_told(tmp_path, trained, capsys):
    old = tmp_path / "gone" / "seed_0"
    old.mkdir(parents=True)
    (old / "rows.json").write_text("{}")
    main([DIGITS, f"--workdir={tmp_path}", "--seeds=0"])
    assert "gone/seed_0 is no job of this sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": (0, 0)}, "seeds have 0 twice"),
        ({"ratios": (0.5, 0.5)}, "ratios have 0.5 twice"),
        ({"trials": {"dense": Trial("configs/digits_dense.py")}}, "lines have 'dense' twice"),
        ({"trials": {"a": Trial("x", "f", (1.0, 1.0))}}, "budgets of 'a' have 1.0 twice"),
    ],
)
def test_one_name_for_two_things(changes: dict, sentence: str):
    fields = {"dense": SMALL.dense, "ratios": SMALL.ratios, "trials": SMALL.trials}
    with pytest.raises(ValueError, match=sentence):
        module.check_names(Sweep(**{**fields, **changes}))


def test_files_that_are_no_sweeps(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no python file"):
        load_sweep("configs/sweep/nothing.py")
    with pytest.raises(ValueError, match="no get_sweep"):
        load_sweep("configs/digits_dense.py")
    gone = tmp_path / "gone.py"
    gone.write_text(
        "from tokred.train.sweep import Sweep\n"
        "def get_sweep(): return Sweep('configs/gone.py', (0.5,), {})\n"
    )
    with pytest.raises(SystemExit):
        command(["sweep", str(gone), f"--workdir={tmp_path}"])
    assert "recipe 'configs/gone.py' does not exist" in capsys.readouterr().err


def test_without_the_dense_run_there_is_no_table():
    with pytest.raises(ValueError, match="line 'dense'"):
        tidy([row("diffrate", 0, line="rates", budget=0.5)])


def test_soft_twins_are_in_the_table_and_not_in_the_picture(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(viz, "plot_frontier", lambda rows, *_: drawn.extend(rows))
    lines = {"dense": "dense", "gate": "mrt5", "gate soft": "mrt5 soft"}
    rows = [row(method, 0, line=line, budget=0.7) for line, method in lines.items()]
    write_report(rows, tmp_path, "tokred sweep", "accuracy")
    assert [told["line"] for told in drawn] == ["dense", "gate"]
    assert "gate soft" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_runs(tmp_path, capsys):
    tiny = tmp_path / "tiny.py"
    tiny.write_text(
        "from tests.train.test_sweep import SMALL\n"
        "from dataclasses import replace\n"
        "def get_sweep(): return replace(SMALL, ratios=(0.8,), seeds=(0,))\n"
    )
    main([str(tiny), f"--workdir={tmp_path / 'runs'}", "--config.log.progress=False"])
    assert "rates 0.5" in capsys.readouterr().out
    assert (tmp_path / "runs" / "frontier.png").stat().st_size > 1000


def test_parts_of_a_larger_model_are_swept(tmp_path):
    """Fewer layers are those of what is reduced; one budget is for all that is composed."""
    found = {job.name: job for job in list_jobs(load_sweep("configs/sweep/grid.py"), tmp_path, [0])}
    smaller = found["smaller_dense/depth_3_2/seed_0"].config.model
    assert (smaller.vision.depth, smaller.decoder.depth) == (3, 2)
    composed = found["all three/0.55/seed_0"]
    assert composed.config.train.macs == 0.55 and not composed.ready
    assert composed.after == tmp_path / "dense" / "seed_0"
    depths = found["depths/0.5/seed_0"].config
    assert depths.beside["decoder/pmod"].keep == 0.5
    assert found["queries/8/seed_0"].config.beside.mqt.length == 8
    assert found["dense/seed_0"].ready


def test_a_sweep_may_go_on_from_models_of_each_seed(tmp_path):
    """Without ratios there are neither baselines nor smaller models."""
    sweep, start = load_sweep("configs/sweep/bytes.py"), "start_from=runs/pretrain/seed_{seed}"
    found = {job.name: job for job in list_jobs(sweep, tmp_path, [0, 1], [start])}
    learned, controls = {"gate", "depths", "gate and depths"}, {"random", "stride", "fewer layers"}
    assert {name.split("/")[0] for name in found} == {"dense", *learned, *controls}
    starts = {name: job.config.start_from for name, job in found.items()}
    assert starts["fewer layers/1/seed_1"] == ""
    assert starts["dense/seed_1"] == starts["depths/seed_1"] == "runs/pretrain/seed_1"
    assert all(job.ready for job in found.values())
