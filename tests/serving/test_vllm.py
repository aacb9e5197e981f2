"""vLLM serves the sandbox's vision-language model, and judges label rendered scenes through it: `make test-vllm`.

VLLM_PYTHON is the interpreter that has vLLM, VLM the model folder. Apart from the ordinary tests: the environment is
another and weighs 3.5 GB.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.errors import ServerError
from alignkit.records import Prompt
from alignkit.sandbox.captions import parse, random_caption
from alignkit.sandbox.scenes import compose, contradict, render
from rewards.models.patches import Patches
from rewards.served_yes_no import ServedYesNo
from rewards.serving.chat_client import ChatClient
from rewards.serving.judge import TOP, RewardJudge, ServedJudge
from rewards.serving.messages import media_parts, text_part, user

FOLDER = Path(os.environ.get("VLM", "alignkit/sandbox/weights/vlm")).absolute()
PATIENCE = 600.0  # seconds until the server answers; 30 to 70 were measured
PAIRS = 60


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The URL of vLLM, serving the folder as "vlm"."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER), "--served-model-name", "vlm"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--limit-mm-per-prompt", '{"image": 16, "video": 2}']
    with _serving(command, own, tmp_path_factory.mktemp("vllm") / "server.log") as url:
        yield url


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory):
    """The URL of `transformers serve`, which names a model by its folder and gives no probabilities."""
    command = [str(Path(__file__).with_name("transformers_cpu.py")), "serve", "--device", "cpu"]
    with _serving(command, {}, tmp_path_factory.mktemp("transformers") / "server.log") as url:
        yield url


@contextlib.contextmanager
def _serving(command, own, log):
    """The URL of a server on a free port that is up; it ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [os.environ["VLLM_PYTHON"], *command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    own = own | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | own, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process, url, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")


def picture(scene, rng):
    return torch.from_numpy(np.asarray(render(scene, rng))).permute(2, 0, 1).float()


@pytest.fixture(scope="session")
def scenes():
    """Pictures that show their captions [N, 3, 64, 64], pictures that contradict them, and the captions."""
    rng = np.random.default_rng(7)
    captions = [random_caption(rng) for _ in range(PAIRS)]
    specs = [parse(caption) for caption in captions]
    right = torch.stack([picture(compose(spec, rng), rng) for spec in specs])
    wrong = torch.stack([picture(compose(contradict(spec, rng), rng), rng) for spec in specs])
    return right, wrong, [Prompt.from_text(caption) for caption in captions]


def _own_answer(model, tokenizer, cut, pictures, question):
    """log-probabilities of the first token of the answer, [vocabulary], of the folder's weights read here."""
    patches, grid = cut(pictures.mul(255).round().div(255))
    turn = [{"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    pad = "<|image_pad|>"
    ids = torch.tensor([tokenizer(text.replace(pad, pad * (int(grid[0].prod()) // cut.merge**2))).input_ids])
    kinds = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        output = model(ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=kinds, logits_to_keep=1)
    return output.logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_served_answer_is_the_models_own(server, scenes, count):
    """The twenty likeliest first tokens and their log-probabilities, for one picture and for two in one turn."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    stored = json.loads((FOLDER / "preprocessor_config.json").read_text())
    sizes = {"min_pixels": stored["size"]["shortest_edge"], "max_pixels": stored["size"]["longest_edge"]}
    colours = {"mean": stored["image_mean"], "std": stored["image_std"]}
    cut = Patches(stored["patch_size"], stored["merge_size"], **sizes, **colours)
    sampling = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
    for row in range(4):
        pictures = torch.stack([side[row] for side in scenes[:count]])
        question = f'Does this figure show "{scenes[2][row].text}"? Please answer Yes or No.'
        parts = [part for picture in pictures for part in media_parts(picture)]
        (reply,) = ChatClient(server, "vlm").ask([{"messages": user([*parts, text_part(question)]), **sampling}])
        own = _own_answer(model, tokenizer, cut, pictures, question).topk(TOP)
        served = sorted((value for _, value in reply.first), reverse=True)
        assert served == pytest.approx(own.values.tolist(), abs=1e-3)
        assert reply.first[0][0] == tokenizer.decode([own.indices[0]]).replace("\ufffd", "")


def test_beliefs_label_scene_pairs(server, scenes):
    right, wrong, prompts = scenes
    reward = ServedYesNo(server, "vlm", concurrency=16)
    verdicts = RewardJudge(reward).compare(right, wrong, prompts)
    print(f"\nP(yes) labels {verdicts.count(1)} of {PAIRS} pairs right, {verdicts.count(-1)} wrong; {reward.report()}")
    assert verdicts.count(1) >= 0.9 * PAIRS


def test_a_judge_labels_scene_pairs_in_both_orders(server, scenes, tmp_path):
    """Right more often than not where it decides; a restart gives the same labels and asks nothing."""
    right, wrong, prompts = scenes
    options = {"concurrency": 16, "cache": tmp_path}
    judge = ServedJudge(server, "vlm", **options)
    verdicts = judge.compare(right, wrong, prompts)
    print(f"\nin both orders {verdicts.count(1)} of {PAIRS} right, {verdicts.count(-1)} wrong; {judge.report()}")
    assert verdicts.count(1) + verdicts.count(-1) + sum(judge.report().abstentions.values()) == PAIRS
    again = ServedJudge(server, "vlm", **options)
    assert again.compare(right, wrong, prompts) == verdicts
    assert again.report().attempts == 0
    assert ServedJudge(server, "vlm", **options).compare(wrong, right, prompts) == [-verdict for verdict in verdicts]
    sure = ServedJudge(server, "vlm", least_margin=1.0, **options).compare(right, wrong, prompts)
    assert all(verdict in (0, known) for verdict, known in zip(sure, verdicts, strict=True))
    assert verdicts.count(1) > 10 * verdicts.count(-1)
    assert verdicts.count(1) >= 0.6 * PAIRS


def test_transformers_serve_judges_as_vllm_does(server, plain_server, scenes):
    """Greedy answers of the same weights by two engines; where no probability is given, asking for one says so."""
    right, wrong, prompts = scenes
    verdicts = [
        ServedJudge(url, name).compare(right, wrong, prompts)
        for url, name in ((server, "vlm"), (plain_server, str(FOLDER)))
    ]
    same = sum(one == other for one, other in zip(*verdicts, strict=True))
    print(f"\ntransformers serve and vLLM agree on {same} of {PAIRS} pairs; {verdicts[1].count(1)} right")
    assert same >= PAIRS - 1
    with pytest.raises(ServerError, match="gives no log-probabilities"):
        ServedYesNo(plain_server, str(FOLDER))(right[:1], prompts[:1])


@pytest.mark.parametrize("clips", ["frames", "video"])
def test_clips_are_served(server, clips):
    reward = ServedYesNo(server, "vlm", modality="video", clips=clips, frames=6)
    scores = reward(
        torch.rand(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)), [Prompt.from_text("a")] * 2
    )
    assert torch.isfinite(scores.total).all()
    assert reward.report().prompt_tokens > 0


def test_what_vllm_refuses_is_said(server, caplog):
    with pytest.raises(ServerError, match="404: The model `other` does not exist"):
        ServedYesNo(server, "other")(torch.rand(1, 3, 64, 64), [Prompt.from_text("a")])
    long = ServedYesNo(server, "vlm")(torch.rand(1, 3, 64, 64), [Prompt.from_text("a circle " * 2000)])
    assert long.total.isnan().all()
    assert "maximum context length is 1024" in caplog.text
