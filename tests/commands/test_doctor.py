"""`alignkit doctor`: the machine, and a planned training."""

from __future__ import annotations

from alignkit import cli


def test_the_machine(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "cpu, " in said
    assert "torchvision" in said


def test_a_model_folder_and_a_method(model_folders, capsys):
    words = ["doctor", f"--model={model_folders['flow']}", "--method=rankdpo", "--resolution=2048"]
    assert cli.main(words) == 0, capsys.readouterr().err
    plain = capsys.readouterr().out
    assert cli.main([*words, "--full_finetune=true", "--batch=8"]) == 0
    full = capsys.readouterr().out
    assert "peak memory of rankdpo on flow" in plain
    assert "frozen reference copy" in full
    sizes = [[line.split()[-2] for line in said.splitlines() if "activations" in line] for said in (plain, full)]
    assert float(sizes[1][0]) > 4 * float(sizes[0][0]) > 0


def test_a_hub_id_is_told_how_to_be_downloaded_without_asking_the_network(monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(AssertionError("network")))
    assert cli.main(["doctor", "--model", "stabilityai/some-model"]) == 2
    assert "hf download stabilityai/some-model --local-dir" in capsys.readouterr().err


def test_a_model_folder_that_lacks_files(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": ["a", "b"]}', encoding="utf-8")
    assert cli.main(["doctor", f"--model={tmp_path}"]) == 2
    assert "incomplete, missing: unet/" in capsys.readouterr().err
