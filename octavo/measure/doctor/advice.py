"""From what the doctor measured to what it advises: plain words, with the numbers behind them."""

from __future__ import annotations

from octavo.measure.doctor.diagnosis import Diagnosis, Finding

WIDE = 8  # a channel that many times as wide as the median is an outlier; models without any stay at 3


def findings(found: Diagnosis) -> list[Finding]:
    """Everything to know about an accepted model, most basic first."""
    own = [_binding(found), _self_check(found), _positions(found), _keys(found), _outliers(found)]
    return [finding for finding in own if finding is not None] + _formats(found)


def _binding(found: Diagnosis) -> Finding:
    assert found.anatomy is not None
    layers, name = found.anatomy.layers, found.anatomy.architecture
    return Finding("ok", "binding", f"{name} is accepted: its {layers} attention layers all reach Octavo's cache")


def _self_check(found: Diagnosis) -> Finding:
    assert found.self_check is not None
    assert found.anatomy is not None
    check, dtype = found.self_check, found.anatomy.dtype
    numbers = (
        f"two sequences in one batch differ from each alone by {_relative(check.alone)}, and from transformers' own "
        f"attention by {_relative(check.transformers)}"
    )
    if check.passed:
        return Finding("ok", "self-check", f"{numbers}: rounding in {dtype}")
    return Finding(
        "warning", "self-check", f"{numbers}; rounding in {dtype} stays below {check.tolerance:.0e}. Do not serve this "
        "model with Octavo: its answers would depend on who else is served. Please report the architecture"
    )  # fmt: skip


def _positions(found: Diagnosis) -> Finding | None:
    assert found.anatomy is not None
    if found.anatomy.shift_invariant is not False:
        return None
    return Finding(
        "note",
        "positions",
        "attention depends on where a text stands, not only on distances: a calibration sees positions from 0 on "
        "only, so calibrate with windows as long as the sessions to be served (--calib-seqlen)",
    )


def _keys(found: Diagnosis) -> Finding | None:
    biased = [layer for layer in found.keys if layer.biased]
    if not biased:
        largest = max((layer.offset for layer in found.keys), default=0)
        return Finding(
            "ok",
            "key biases",
            f"no channel of K holds a large constant: at most {largest:.0f} times the spread of its head's channels",
        )
    worst = max(biased, key=lambda layer: layer.offset)
    where = listed([layer.layer for layer in biased])
    norms = f", key bias norm {worst.bias_norm:.0f}" if worst.bias_norm is not None else ""
    text = (
        f"in layer{'s' if len(biased) > 1 else ''} {where} a few channels of K hold a large constant (layer "
        f"{worst.layer}: {worst.channels} channels, up to {worst.offset:.0f} times the spread of the others{norms}), "
        "as in Qwen2 and Qwen2.5. One scale for a whole row gives them nearly all its steps; calibrated channels take "
        "the constant out"
    )
    return Finding("note", "key biases", text)


def _outliers(found: Diagnosis) -> Finding:
    wide = [w for w in found.widths if w.ratio > WIDE]
    worst = max(found.widths, key=lambda w: w.ratio)
    numbers = f"{worst.side} of layer {worst.layer}: the widest channel is {worst.ratio:.1f} times the median one"
    if not wide:
        return Finding("ok", "outlier channels", f"none; most in {numbers}")
    sides = "; ".join(
        f"{side} of layer{'s' if len(own) > 1 else ''} {listed(own)}"
        for side in "KV"
        if (own := [w.layer for w in wide if w.side == side])
    )
    return Finding("note", "outlier channels", f"{sides}. Most in {numbers}; calibrated channels even them out")


def _formats(found: Diagnosis) -> list[Finding]:
    """Which formats are advised: one finding for 8 bits, one for 4."""
    scores = {score.name: score for score in found.formats}
    grades = {name: found.grade(score) for name, score in scores.items()}

    def kl(name: str) -> str:
        return f"KL {scores[name].kl:.1e}"

    command = f"octavo calibrate {found.model}"
    calibrated = [name for name in ("int8-token, calibrated", "int8") if grades[name] == "good"]
    if grades["int8-token"] == "good":
        text = f"--kv int8-token works without calibration ({kl('int8-token')})"
        if "int8" in calibrated:
            text += f"; after `{command}`, --kv int8 takes no byte beside the codes ({kl('int8')})"
        else:
            text += f"; --kv int8 is worse even when calibrated ({kl('int8')})"
        eight = Finding("ok", "8 bits", text)
    elif calibrated:
        good = " or ".join(f"--kv {name.partition(',')[0]} ({kl(name)})" for name in calibrated)
        eight = Finding(
            "warning",
            "8 bits",
            f"do not serve int8-token without a calibration: {kl('int8-token')}, "
            f"{scores['int8-token'].kl / scores[calibrated[0]].kl:.0f} times as much as with one. Run `{command}`, "
            f"then serve with {good}, at channel granularity (one range a layer: {kl('int8, tensor × 1.0')})",
        )
    else:
        eight = Finding(
            "warning",
            "8 bits",
            f"no 8-bit format is close to the 16-bit cache here: int8 {kl('int8')}, int8-token {kl('int8-token')}, "
            f"calibrated {kl('int8-token, calibrated')}. Stay with 16 bits, or calibrate on more text of your own and "
            "measure with `octavo accuracy`",
        )
    return [eight, _four_bits(found, grades)]


def _four_bits(found: Diagnosis, grades: dict[str, str]) -> Finding:
    scores = {score.name: score for score in found.formats}
    for kv in ("int4-token", "k8v4"):
        plain, own = scores[kv], scores[f"{kv}, calibrated"]
        best = own if own.kl < 0.8 * plain.kl else plain  # a calibration has to be worth the trouble
        if grades[best.name] != "poor":
            return Finding(
                "note",
                "4 bits",
                f"--kv {kv}{' with a calibration' if best is own else ''} costs KL {best.kl:.1e} and changes "
                f"{1 - best.agreement:.1%} of the most likely tokens: for when memory matters more; measure your own "
                "task first",
            )
    numbers = ", ".join(f"{name} {scores[name].kl:.1e}" for name in scores if "4" in name)
    return Finding("note", "4 bits", f"not on this model: KL {numbers}")


def _relative(errors: tuple[float, float]) -> str:
    median, worst = errors
    return f"{median:.0e} (worst row {worst:.0e})" if worst else "nothing"


def listed(layers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2 and 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]
