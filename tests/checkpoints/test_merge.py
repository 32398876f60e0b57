"""Merging files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rwkvpeft.checkpoints import merge
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import fingerprint, load_tensors, save_tensors
from rwkvpeft.checkpoints.fold import MergeInput
from rwkvpeft.checkpoints.merge import merge_files, merge_several
from rwkvpeft.errors import UserError

LORA = Recipe(method="lora", config={"r": 2, "lora_alpha": 8})


def base_tensors(dtype=torch.float32):
    shapes = {
        "emb.weight": (20, 6),
        "blocks.0.ln1.weight": (6,),
        "blocks.0.att.r_k": (2, 4),
        "blocks.0.att.receptance.weight": (8, 6),
        "blocks.0.att.key.weight": (8, 6),
        "head.weight": (20, 6),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def lora_tensors():
    return {
        "blocks.0.att.key.lora_A": torch.randn(2, 6),
        "blocks.0.att.key.lora_B": torch.randn(8, 2),
        "blocks.0.ln1.weight": torch.randn(6),
    }


@pytest.fixture
def files(tmp_path):
    save_tensors(tmp_path / "base.pth", base_tensors())
    save_adapter(tmp_path / "rwkv-0.pth", lora_tensors(), LORA)
    return tmp_path / "base.pth", tmp_path / "rwkv-0.pth", tmp_path / "out.pth"


def test_trained_parts_replace_base_tensors_and_the_rest_stays(files):
    base, adapter, output = files
    report = merge_files(base, adapter, output)
    merged, before, trained = load_tensors(output), load_tensors(base), load_tensors(adapter)
    assert report == ("lora", 1, 1, 0, 6, "none")
    assert torch.equal(merged["blocks.0.ln1.weight"], trained["blocks.0.ln1.weight"])
    assert torch.equal(merged["head.weight"], before["head.weight"])
    update = 4 * trained["blocks.0.att.key.lora_B"] @ trained["blocks.0.att.key.lora_A"]
    torch.testing.assert_close(merged["blocks.0.att.key.weight"], before["blocks.0.att.key.weight"] + update)


def test_the_base_keeps_its_dtype(tmp_path):
    save_tensors(tmp_path / "base.pth", base_tensors(torch.float16))
    save_adapter(tmp_path / "a.pth", lora_tensors(), LORA)
    merge_files(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "out.pth")
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out.pth").values()} == {torch.float16}


def test_prefixes_of_the_base_are_stripped(files, tmp_path):
    base, adapter, output = files
    tensors = load_tensors(base)
    save_tensors(tmp_path / "prefixed.pth", {f"_forward_module.{name}": tensor for name, tensor in tensors.items()})
    # a base is recognised as prefixed by its first block
    merge_files(tmp_path / "prefixed.pth", adapter, output)
    assert set(load_tensors(output)) == set(tensors)


def unused(base, adapter, output):
    save_adapter(adapter, {**lora_tensors(), "blocks.9.att.key.lora_A": torch.zeros(2, 6)}, LORA)


def misshapen(base, adapter, output):
    save_adapter(adapter, {**lora_tensors(), "blocks.0.att.key.lora_B": torch.zeros(7, 2)}, LORA)


def misshapen_part(base, adapter, output):
    save_adapter(adapter, {**lora_tensors(), "blocks.0.ln1.weight": torch.zeros(7)}, LORA)


def other_base(base, adapter, output):
    save_adapter(adapter, lora_tensors(), Recipe(method="lora", base_fingerprint=fingerprint(adapter)))


def full_model(base, adapter, output):
    save_adapter(adapter, base_tensors(), Recipe(method="none"))


def output_folder(base, adapter, output):
    output.mkdir()


FAULTS = [unused, misshapen, misshapen_part, other_base, full_model, output_folder]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_merge_that_cannot_be_right_is_refused_and_leaves_nothing(files, fault):
    fault(*files)
    before = sorted(files[0].parent.iterdir())
    with pytest.raises(UserError):
        merge_files(*files)
    assert sorted(files[0].parent.iterdir()) == before


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_an_input_is_refused(files, which):
    with pytest.raises(UserError, match="overwrite"):
        merge_files(files[0], files[1], files[which])


def test_an_unwritable_output_is_refused(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        merge_files(files[0], files[1], tmp_path / "file" / "out.pth")


def test_an_existing_output_survives_an_error_while_writing(files, monkeypatch):
    base, adapter, output = files
    output.write_text("older")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_tensors", fail)
    with pytest.raises(UserError, match="No space left"):
        merge_files(base, adapter, output)
    assert output.read_text() == "older"
    assert len(list(output.parent.iterdir())) == 4


def test_a_file_that_reads_back_differently_is_not_kept(files, monkeypatch):
    base, adapter, output = files
    monkeypatch.setattr(merge, "_probe", lambda tensor, seen=[]: seen.append(1) or bytes([len(seen)]))
    with pytest.raises(UserError, match="reads back differently"):
        merge_files(base, adapter, output)
    assert not output.exists()


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 2, 2)])
def test_a_state_is_added_when_its_heads_are_the_models(tmp_path, shape):
    save_tensors(tmp_path / "base.pth", base_tensors(torch.bfloat16))
    save_adapter(tmp_path / "s.pth", {"blocks.0.att.time_state": torch.randn(shape)}, Recipe(method="state"))
    paths = tmp_path / "base.pth", tmp_path / "s.pth", tmp_path / "out.pth"
    if shape == (2, 4, 4):
        assert merge_files(*paths).added == 1
        assert load_tensors(paths[2])["blocks.0.att.time_state"].dtype == torch.float32
    else:
        with pytest.raises(UserError, match="does not fit"):
            merge_files(*paths)


def test_safetensors_output_holds_the_same_tensors(files):
    load_file = pytest.importorskip("safetensors.torch").load_file
    base, adapter, output = files
    merge_files(base, adapter, output)
    merge_files(base, adapter, output.with_suffix(".st"), format="safetensors")
    expected, found = load_tensors(output), load_file(output.with_suffix(".st"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


PEAK = """
import resource, sys, torch
from rwkvpeft.checkpoints.fold import MergeInput
from rwkvpeft.checkpoints.merge import merge_files, merge_several
merge_files(sys.argv[1], sys.argv[1].replace("base", "a"), sys.argv[2])  # a small merge warms everything up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_files(sys.argv[3], sys.argv[4], sys.argv[5], quant=sys.argv[6])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(files, tmp_path, quant):
    width, layers = 2048, 60
    matrix = torch.randn(width, width).to(torch.bfloat16)
    save_tensors(tmp_path / "big.pth", {
        f"blocks.{layer}.att.{name}.weight": matrix + layer for layer in range(layers) for name in ("key", "value")
    })
    save_adapter(tmp_path / "big_a.pth", {
        f"blocks.{layer}.att.key.{name}": torch.randn(shape)
        for layer in range(layers) for name, shape in (("lora_A", (4, width)), ("lora_B", (width, 4)))
    }, LORA)
    small_adapter = tmp_path / "a.pth"
    save_adapter(small_adapter, lora_tensors(), LORA)
    arguments = [files[0], files[2], tmp_path / "big.pth", tmp_path / "big_a.pth", tmp_path / "big_out.pth", quant]
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model_bytes = (tmp_path / "big.pth").stat().st_size
    assert model_bytes > 1e9
    # the map is given back every 128 MiB; a tensor of 8 MiB in three copies and the allocator's slack come on top
    assert int(done.stdout) < 300e6


def test_names_of_one_format_are_one_format(files, tmp_path):
    pytest.importorskip("bitsandbytes")
    base, first, output = files
    second = tmp_path / "second.pth"
    for path, quant in ((first, "4bit"), (second, "fp4")):
        save_adapter(path, lora_tensors(), replace(LORA, quant=quant, base_fingerprint=fingerprint(base)))
    report = merge_several(base, [MergeInput(first, 0.5), MergeInput(second, 0.5)], output)
    assert report.quant == "fp4"


def test_adapters_of_differently_quantised_bases_are_refused(files, tmp_path):
    base, first, output = files
    second = tmp_path / "second.pth"
    for path, quant in ((first, "fp8"), (second, "none")):
        save_adapter(path, lora_tensors(), replace(LORA, quant=quant, base_fingerprint=fingerprint(base)))
    with pytest.raises(UserError, match="differently quantised"):
        merge_several(base, [MergeInput(first), MergeInput(second)], output)


def test_an_adapter_without_a_recipe_leaves_the_base_to_the_one_with(files, tmp_path):
    base, first, output = files
    save_adapter(first, lora_tensors(), replace(LORA, quant="fp8", base_fingerprint=fingerprint(base)))
    shard = {"blocks.0.att.receptance.disha": torch.zeros(2, 8)}
    save_tensors(tmp_path / "bare.pth", shard)
    assert merge_several(base, [MergeInput(first), MergeInput(tmp_path / "bare.pth")], output).quant == "fp8"


def test_weights_of_several_adapters_scale_what_each_of_them_changes(files, tmp_path):
    base, first, output = files
    second, other = tmp_path / "second.pth", lora_tensors()
    save_adapter(second, other, LORA)
    merge_several(base, [MergeInput(first, 0.25), MergeInput(second, 2.0)], output)
    merged, before, one = load_tensors(output), load_tensors(base), load_tensors(first)
    key = "blocks.0.att.key"
    changes = (0.25 * one[f"{key}.lora_B"] @ one[f"{key}.lora_A"], 2 * other[f"{key}.lora_B"] @ other[f"{key}.lora_A"])
    expected = before[f"{key}.weight"] + 4 * sum(changes)
    torch.testing.assert_close(merged[f"{key}.weight"], expected)
    norm = "blocks.0.ln1.weight"
    expected = before[norm] + 0.25 * (one[norm] - before[norm]) + 2.0 * (other[norm] - before[norm])
    torch.testing.assert_close(merged[norm], expected)
