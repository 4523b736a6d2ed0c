"""What must hold of the one command for a GPU: every part leaves its figures, and the summary has them all."""

import json

import pytest
from programs import load, run


@pytest.fixture(scope="module")
def step_profile():
    return load("step_profile")


@pytest.mark.slow
def test_the_dry_run_measures_every_part(tmp_path):
    done = run("gpu", "--dry-run", "--peers", "none", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {
        "sweep-none-1", "xl-full-1", "decode-1", "profile", "compile-cold", "compile-warm", "reader", "flags-none",
    }  # fmt: skip
    written = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert expected <= set(written), done.stdout
    for name, result in written.items():
        if name not in ("profile", "reader"):
            assert result["contestants"]["slm_jax"]["median"] > 0, name
            assert not result["skipped"], name
    # The profile is of these steps: it has their products, and none of it is longer than they are.
    profile = written["profile"]
    assert 0 < profile["kinds_ms"]["matrix products"] < 2 * profile["step_ms"]
    assert 0 < profile["busy_share"] <= 1
    summary = (tmp_path / "summary.md").read_text()
    assert summary in done.stdout
    bars = [line for line in summary.splitlines() if line.startswith("| data reader")]
    assert len(bars) == 2
    assert all(line.endswith(("| yes |", "| no |")) for line in bars)
    # No peer took part, and the page says so.
    assert "| training beside nanoGPT compiled, in turns | ≥ 1.15× | not measured |  |" in summary


def test_what_was_measured_stays_where_no_time_is_left(tmp_path):
    gpu = load("gpu")
    before = tmp_path / "train-nanogpt.json"
    before.write_text('{"rounds": 7}')
    session = gpu.Session(tmp_path, gpu.DRY, [], [], tmp_path)
    assert session.run("train-nanogpt", ["-c", "raise SystemExit"]) == {}
    assert before.read_text() == '{"rounds": 7}'


@pytest.mark.parametrize(
    ("share", "met"), [(0.01, "1.00% | yes"), (0.02, "2.00% | yes"), (0.03, "3.00% | no"), (None, "not measured | ")]
)
def test_a_share_of_two_percent_is_met_at_most(tmp_path, share, met):
    (tmp_path / "reader.json").write_text(json.dumps({"figures": {"share_of_step": share}}))
    assert f"| data reader's share of a step | ≤ 2% | {met} |" in load("gpu_results").summary(tmp_path)


def test_the_newest_trace_of_a_folder_is_read(step_profile, tmp_path):
    import jax

    for number in ("1", "0"):
        jax.profiler.start_trace(str(tmp_path / number))
        jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))).block_until_ready()
        jax.profiler.stop_trace()
    newest = step_profile.read_events(tmp_path / "0")
    assert newest
    assert step_profile.read_events(tmp_path) == newest


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("input_reduce_fusion_3", "reductions"),
        ("something_else", "other"),
    ],
)
def test_what_a_kernel_is(step_profile, name, kind):
    assert kind in step_profile.kind_of(name)


def test_a_summary_of_steps(step_profile):
    overlapping = [step_profile.Event("dot", began, length) for began, length in [(10, 5), (0, 4), (12, 8), (13, 1)]]
    assert step_profile.busy_nanoseconds(overlapping) == 4 + 10
    timed = [("dot", 0, 2e6), ("dot", 3e6, 2e6), ("copy", 5e6, 1e6)]
    events = [step_profile.Event(*event) for event in timed]
    result = step_profile.summarize(events, wall_seconds=0.01, steps=2)
    assert result["step_ms"] == 5
    assert result["busy_share"] == pytest.approx(0.5)
    assert result["longest_ms"] == {"dot": 2.0, "copy": 0.5}
    assert "| matrix products | 2.00 | 40.0% |" in step_profile.table(result)
