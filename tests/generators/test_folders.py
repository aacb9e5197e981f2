"""Model folders as they come: other file layouts load, damaged and hostile ones are refused by name.

`load_generator` and the doctor read a folder in the same way, so each refusal is shown for both.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from alignkit import cli
from alignkit.commands.doctor.model_shapes import read_model
from alignkit.errors import AlignKitError, DataError, MissingFileError, UnknownNameError
from alignkit.generators import load_generator
from alignkit.generators.components import require_finite
from alignkit.generators.folders import find_weights

UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture
def folder(model_folders, tmp_path):
    """A copy of the tiny Stable Diffusion folder."""
    return shutil.copytree(model_folders["unet"], tmp_path / "model")


def edit_tensors(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuse(folder: Path, match: str, kind: type[AlignKitError] = DataError, *, doctor: bool = True) -> None:
    with pytest.raises(kind, match=match):
        load_generator(folder, device="cpu")
    if doctor:
        with pytest.raises(kind, match=match):
            read_model(folder)


def weights_of(generator) -> dict[str, torch.Tensor]:
    parts = {"unet": generator.net, "text_encoder": generator.pipeline.text_encoder, "vae": generator.pipeline.vae}
    return {f"{part}.{key}": value for part, net in parts.items() for key, value in net.state_dict().items()}


# --- weights that do not fill the networks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        (UNET, "down_blocks.0.attentions.0.proj_in.weight"),
        (TEXT, "encoder.layers.0.self_attn.q_proj.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.bias"),
    ],
)
def test_every_network_must_be_filled(folder, stem, key):
    """A missing tensor, one too many and one of another shape, in networks of both libraries."""
    file = folder / f"{stem}.safetensors"
    named, whole = key.replace(".", r"\."), file.read_bytes()
    edit_tensors(file, lambda tensors: tensors.pop(key))
    refuse(folder, rf"{stem}\.safetensors.*do not fit the \w+ .*: 1 missing \({named}\)\. ")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    refuse(folder, rf"{stem}\.safetensors.*: 1 left over \(extra\.weight\)\. ")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({key: torch.zeros(7, 3)}))
    refuse(folder, rf"{stem}\.safetensors.*: 1 of another shape \({named} \[7, 3\] for \[")
    assert cli.main(["doctor", f"--model={folder}"]) == 2


def test_tied_weights_positions_and_heads_are_no_fault(model_folders, tmp_path):
    """T5 stores one name of its tied embedding or both; CLIP's positions and a head without use may be stored."""
    folder = shutil.copytree(model_folders["flow"], tmp_path / "flow")
    expected = load_generator(folder, device="cpu").pipeline.text_encoder_3.state_dict()
    t5, clip = (folder / name / "model.safetensors" for name in ("text_encoder_3", "text_encoder"))
    assert not {"shared.weight", "encoder.embed_tokens.weight"} <= load_file(t5).keys()
    positions = {"text_model.embeddings.position_ids": torch.arange(7)[None]}
    edit_tensors(clip, lambda tensors: tensors.update(positions))
    edit_tensors(t5, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 3)}))
    for both in (False, True):
        if both:
            shared = expected["shared.weight"]
            names = ("shared.weight", "encoder.embed_tokens.weight")
            edit_tensors(t5, lambda tensors: tensors.update({name: shared.clone() for name in names}))  # noqa: B023
        state = load_generator(folder, device="cpu").pipeline.text_encoder_3.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        read_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("stem", "dtype"), [(UNET, torch.float16), (TEXT, torch.float32)])
def test_weights_that_are_not_finite(folder, stem, dtype, value):
    file = folder / f"{stem}.safetensors"
    key = sorted(load_file(file))[2]

    def edit(tensors):
        tensors[key] = tensors[key].to(dtype)
        tensors[key].view(-1)[-1] = value

    edit_tensors(file, edit)
    refuse(folder, rf"{stem}\.safetensors' has NaN or infinite weights in 1 tensors \({key}\)", doctor=False)


def test_a_sum_that_overflows_is_no_fault(tmp_path):
    """Finite float16 weights whose sum is infinite; and float8, which has no sums."""
    file = tmp_path / "model.safetensors"
    tensors = {"large": torch.full((4,), 60000.0).half(), "eighth": torch.ones(3).to(torch.float8_e4m3fn)}
    assert tensors["large"].sum().isinf()
    save_file(tensors, file, {"format": "pt"})
    require_finite(find_weights(tmp_path, "transformers"))
    save_file(tensors | {"eighth": torch.full((3,), float("nan")).to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"\(eighth\)"):
        require_finite(find_weights(tmp_path, "transformers"))


# --- other layouts --------------------------------------------------------------------------------------------------


def stems(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_folder_of_fp16_files_alone(folder, caplog):
    expected = weights_of(load_generator(folder, device="cpu"))
    for file in stems(folder):
        edit_tensors(file, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
        file.rename(file.with_suffix(".fp16.safetensors"))
    generator = load_generator(folder, device="cpu")
    (warned,) = [record.getMessage() for record in caplog.records if "variants" in record.getMessage()]
    assert all(f"{part} (fp16)" in warned for part in ("unet", "text_encoder", "vae"))
    loaded = weights_of(generator)
    assert all(value.dtype == torch.float32 for key, value in loaded.items() if expected[key].is_floating_point())
    assert all(torch.equal(value, expected[key].half().to(value.dtype)) for key, value in loaded.items())
    assert read_model(folder).stored("unet") == sum(net.numel() for net in generator.net.state_dict().values())


def test_full_files_come_before_variants(folder):
    file = folder / f"{UNET}.safetensors"
    expected = load_file(file)
    save_file({key: torch.zeros_like(value) for key, value in expected.items()}, file.with_suffix(".fp16.safetensors"))
    state = load_generator(folder, device="cpu").net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_shards_of_a_variant(folder):
    file = folder / f"{TEXT}.safetensors"
    tensors = load_file(file)
    names = {key: f"model.fp16-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in names if names[key] == name}, file.parent / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (file.parent / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    expected = weights_of(load_generator(folder, device="cpu"))
    file.unlink()
    loaded = weights_of(load_generator(folder, device="cpu"))
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    read_model(folder)
    (file.parent / "model.fp16-00002-of-00002.safetensors").unlink()
    refuse(folder, r"missing: text_encoder/model\.fp16-00002-of-00002\.safetensors", MissingFileError)


class Code:
    """What a pickle of it runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bin_files_are_read_without_running_code(folder, tmp_path):
    expected = weights_of(load_generator(folder, device="cpu"))
    for file in stems(folder):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    loaded = weights_of(load_generator(folder, device="cpu"))
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    read_model(folder)
    for stem, target in (("text_encoder/pytorch_model", "model"), (UNET, "diffusion_pytorch_model")):
        file = folder / f"{stem}.bin"
        whole = file.read_bytes()
        torch.save({"x": torch.ones(2), "code": Code(tmp_path / "ran")}, file)
        refuse(folder, rf"{stem}\.bin.*not run here; .*torch\.load.*'{target}\.safetensors'")
        assert not (tmp_path / "ran").exists()
        file.write_bytes(whole)


def test_the_doctor_knows_optional_components(model_folders, tmp_path):
    """What is left out at loading is left out by the doctor as well."""
    folder = shutil.copytree(model_folders["flow"], tmp_path / "sd3")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    assert "text_encoder_3" not in read_model(folder).shapes


# --- damaged and hostile files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", [UNET, TEXT])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 600_000) + b'{"a":' * 120_000,
        struct.pack("<Q", 92)
        + b'{"a":{"dtype":"F32","shape":[4611686018427387904,16],"data_offsets":[0,18446744073709551615]}}',
    ],
    ids=["empty", "header of an exabyte", "deep header", "tensor of an exabyte"],
)
def test_headers_of_safetensors(folder, stem, data):
    (folder / f"{stem}.safetensors").write_bytes(data)
    refuse(folder, rf"{stem}\.safetensors' is truncated or no file of weights \(.*copy it again")


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("text_encoder/config.json", "{no", r"text_encoder/config\.json' is no valid JSON"),
        ("unet/config.json", "[1, 2]", r"unet/config\.json' holds a list, not a JSON object"),
        ("unet/config.json", "[" * 200_000, r"unet/config\.json' is no valid JSON"),
        ("scheduler/scheduler_config.json", "", r"scheduler_config\.json' is no valid JSON"),
        ("text_encoder/config.json", '{"hidden_size": "x"}', r"text_encoder/model\.safetensors.*hidden_size"),
        ("unet/config.json", '{"block_out_channels": [-8, 16]}', r"unet/diffusion_.*no UNet2DConditionModel can be"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "{}", r"index\.json' has no weight_map"),
    ],
)
def test_damaged_configs(folder, file, text, match):
    (folder / file).write_text(text)
    refuse(folder, match)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/hostname", "..", 3, "a\\b"])
def test_shards_lie_beside_their_index(folder, name):
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    refuse(folder, "a shard must lie beside its index")


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, DataError, r"a component is called '\.\./unet'"),
        ({"/tmp/unet": ["diffusers", "UNet2DConditionModel"]}, DataError, "a component is called '/tmp/unet'"),
        ({"unet": ["os", "system"]}, DataError, "unet is a system of 'os'; only classes of diffusers and transformers"),
        ({"unet": ["my_unet", "Net"]}, DataError, "'my_unet'; only classes of diffusers and transformers"),
        ({"text_encoder": ["transformers", "AutoModel"]}, DataError, "text_encoder is an AutoModel, which takes its"),
        ({"unet": ["diffusers", "../x"]}, DataError, r"component unet is .*, not \[library, class\]"),
        ({"unet": ["diffusers"]}, DataError, r"component unet is .*, not \[library, class\]"),
        ({"unet": ["diffusers", "NoSuchNet"]}, UnknownNameError, "diffusers as installed has no class 'NoSuchNet'"),
        ({"_class_name": ["pipeline", "Mine"]}, DataError, r"_class_name is \['pipeline', 'Mine'\]"),
        ({"_class_name": None}, DataError, "_class_name is None"),
    ],
)
def test_an_index_that_names_paths_or_code(folder, changes, kind, match):
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit('code of the folder ran')")
    edit_json(folder / "model_index.json", **changes)
    refuse(folder, match, kind)


@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("tokenizer/tokenizer.json", "", "no StableDiffusionPipeline can be made of its files: JSONDecodeError"),
        ("tokenizer/tokenizer.json", "[]", "no StableDiffusionPipeline can be made of its files: TypeError"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x"}', "no StableDiffusionPipeline can be made"),
    ],
)
def test_damaged_tokenizers_and_schedulers(folder, file, data, match):
    (folder / file).write_text(data)
    refuse(folder, match)


def test_a_tokenizer_without_its_vocabulary(folder):
    """The library makes one that knows no word."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refuse(folder, r"incomplete, missing: tokenizer/vocab\.json, tokenizer/merges\.txt", MissingFileError)


def test_components_that_make_no_pipeline(folder):
    edit_json(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    refuse(folder, "no StableDiffusion3Pipeline can be made of its files: ValueError: .*expected")


def test_a_hub_id_is_read_like_a_folder(folder, monkeypatch):
    """What the hub sends passes the same checks; the generator's name and origin stay those of the id."""
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda _: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda _, **parts: str(folder))
    generator = load_generator("someone/tiny", device="cpu")
    assert generator.name == "tiny"
    assert generator.pipeline.name_or_path == "someone/tiny"
    edit_tensors(folder / f"{UNET}.safetensors", lambda tensors: tensors.pop("conv_in.bias"))
    with pytest.raises(DataError, match=r"1 missing \(conv_in\.bias\)"):
        load_generator("someone/tiny", device="cpu")


def test_an_adapter_in_place_of_a_text_encoder(folder):
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    refuse(folder, "text_encoder' holds an adapter")


def test_the_doctor_names_a_pipeline_without_a_family(folder, capsys):
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPAGPipeline")
    with pytest.raises(UnknownNameError, match="a pipeline class without a family"):
        load_generator(folder, device="cpu")
    assert cli.main(["doctor", f"--model={folder}", "--resolution=16"]) == 0
    assert "no family of this version loads a StableDiffusionPAGPipeline: training needs" in capsys.readouterr().out
