"""`rollout` in float64 against a hand-written loop under plain autograd: gradients, starts, conditions and hooks."""

from __future__ import annotations

import pytest
import torch
from random_adapters import stir
from torch.utils.checkpoint import CheckpointError, checkpoint

from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError
from alignkit.generators.rollout import denoise, rollout
from alignkit.records import Sampling

PROMPTS = ["a red circle", "two blue rings on a gray background"]
N, SCALE = 4, 2.5
KINDS = {"epsilon": "unet", "v_prediction": "unet", "sample": "unet", "flow": "flow"}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def double(load):
    """A generator with a LoRA in float64, its grid, conditioning with a gradient and a random state."""

    def make(kind="epsilon"):
        generator = load(KINDS[kind])
        generator.prediction = kind
        generator.add_lora(rank=2, alpha=None, targets=["to_q", "to_v"], dropout=0.0)
        stir(generator.net)
        generator.net.double()
        shape = generator.latent_shape(16, 16)
        cond = generator.encode_prompts(PROMPTS).map(lambda tensor: tensor.double().requires_grad_())
        x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        return generator, generator.grid(N, shape), cond, x

    return make


def leaves(generator, cond, x):
    return [p for p in generator.net.parameters() if p.requires_grad] + [cond.tensors["encoder_hidden_states"], x]


def loss_of(x):
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    return (weights * x).sum() + x.square().sum()


def network(generator, x, t, tensors):
    """The diffusers network called by hand."""
    net, states = generator.net, tensors["encoder_hidden_states"].double().expand(len(x), -1, -1)
    if generator.prediction == "flow":
        pooled = tensors["pooled_projections"].double().expand(len(x), -1)
        times = (t.double() * 1000).expand(len(x))
        return net(hidden_states=x, timestep=times, encoder_hidden_states=states, pooled_projections=pooled).sample
    return net(x, (t * 1000).round().long() - 1, encoder_hidden_states=states).sample


def clean_and_noise(kind, p, x, a, s):
    """x0 and eps of x = a x0 + s eps by hand, one line per prediction type."""
    return {
        "epsilon": lambda: ((x - s * p) / a, p),
        "v_prediction": lambda: ((a * x - s * p) / (a**2 + s**2), (s * x + a * p) / (a**2 + s**2)),
        "sample": lambda: (p, (x - a * p) / s),
        "flow": lambda: ((x - s * p) / (a + s), (x + a * p) / (a + s)),
    }[kind]()


def plain_chain(generator, grid, cond, x, *, active=range(N), coupling=1.0, both=True):
    """The same chain written as one loop without checkpoints."""
    for i in range(N):
        state = coupling * x + (1 - coupling) * x.detach()
        cond_pred, uncond_pred = (
            network(generator, state, grid.t[i], tensors) for tensors in (cond.tensors, cond.null)
        )
        uncond_pred = uncond_pred if both else uncond_pred.detach()
        prediction = uncond_pred + SCALE * (cond_pred - uncond_pred)
        prediction = prediction if i in active else prediction.detach()
        a, s, a_next, s_next = (value.double() for value in grid.step(i))
        clean, noise = clean_and_noise(generator.prediction, prediction, x, a, s)
        x = a_next * clean + s_next * noise
    return x


def gradients(end, inputs):
    results = torch.autograd.grad(loss_of(end), inputs, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, results, strict=True)]


def assert_equal_chains(generator, grid, cond, x, steps, **plain):
    inputs = leaves(generator, cond, x)
    ours = rollout(generator, cond, x, grid, scale=SCALE, steps=steps)
    theirs = plain_chain(generator, grid, cond, x, **plain)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, **EXACT)
    expected = gradients(theirs, inputs)
    assert sum(bool(grad.abs().max() > 1e-6) for grad in expected) > len(inputs) / 2
    for grad, other in zip(gradients(ours, inputs), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10 * max(1.0, float(other.abs().max())))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("active", [None, [1, 3]])
def test_gradients_are_those_of_plain_autograd(double, kind, active):
    """Of weights, conditioning and the first state, with all steps and with some."""
    generator, grid, cond, x = double(kind)
    assert_equal_chains(generator, grid, cond, x, active, active=range(N) if active is None else active)


def test_coupling_and_the_unconditional_branch(double):
    generator, grid, cond, x = double()
    steps = Steps(frozenset({0, 2}), coupling=0.4, unconditional=False)
    assert_equal_chains(generator, grid, cond, x, steps, active=[0, 2], coupling=0.4, both=False)


def test_without_coupling_no_gradient_crosses_the_network(double):
    """A sum over steps: the linear part of DDIM carries the gradient, each network call is differentiated alone."""
    generator, grid, cond, x = double()
    weights, states = [p for p in generator.net.parameters() if p.requires_grad], [x.detach()]
    end = rollout(
        generator, cond, x, grid, scale=SCALE, steps=Steps(coupling=0.0), on_step=lambda _, s, __: states.append(s)
    )
    ours = torch.autograd.grad(loss_of(end), [*weights, x])
    last = states[-1].detach().requires_grad_()
    (adjoint,) = torch.autograd.grad(loss_of(last), last)
    expected = [torch.zeros_like(weight) for weight in weights]
    for i in reversed(range(N)):
        a, s, a_next, s_next = (value.double() for value in grid.step(i))
        cond_pred, uncond_pred = (
            network(generator, states[i].detach(), grid.t[i], tensors) for tensors in (cond.tensors, cond.null)
        )
        prediction = uncond_pred + SCALE * (cond_pred - uncond_pred)
        parts = torch.autograd.grad((prediction * adjoint * (s_next - a_next * s / a)).sum(), weights)
        expected = [total + part for total, part in zip(expected, parts, strict=True)]
        adjoint = adjoint * a_next / a
    for grad, other in zip(ours, [*expected, adjoint], strict=True):
        torch.testing.assert_close(grad, other, **EXACT)
    exact = torch.autograd.grad(loss_of(rollout(generator, cond, x, grid, scale=SCALE)), [*weights, x])
    assert (exact[-1] - ours[-1]).abs().max() > 1e-3


def test_steps_that_do_not_carry_gradients_build_no_graph(double):
    generator, grid, cond, x = double()
    end = rollout(generator, cond, x.detach(), grid, scale=SCALE, steps=[])
    assert not end.requires_grad
    with pytest.raises(ConfigError, match=r"steps \[-1, 4\] are not on the grid, which has steps 0 to 3"):
        rollout(generator, cond, x, grid, scale=SCALE, steps=[-1, 2, 4])
    with pytest.raises(ConfigError, match=r"coupling is 1\.5"):
        Steps(coupling=1.5)


def test_denoise_takes_steps_and_keeps_float64(double):
    """Truncated backpropagation: the gradient of the last step alone."""
    generator, grid, cond, _ = double()
    sampling = Sampling(steps=N, guidance_scale=SCALE, height=16, width=16)
    seeds = (5, 6)
    noise = [torch.randn(1, *generator.latent_shape(16, 16), generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.cat(noise).double()
    ours = denoise(generator, cond, seeds, sampling, steps=[N - 1])
    theirs = plain_chain(generator, grid, cond, x, active=[N - 1])
    torch.testing.assert_close(ours, theirs, **EXACT)
    inputs = leaves(generator, cond, x)[:-1]
    for grad, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(grad, other, **EXACT)


# --- starts, conditions, hooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_chain_goes_on_from_any_state(double, kind):
    """From a state at sigma eta the chain is the tail of the full one."""
    generator, grid, cond, x = double(kind)
    states = []
    with torch.no_grad():
        end = rollout(generator, cond, x, grid, scale=SCALE, on_step=lambda _, state, __: states.append(state))
        eta = float(grid.sigma[2])
        tail = grid.from_sigma(eta)
        assert len(tail) == N - 2
        torch.testing.assert_close(rollout(generator, cond, states[1], tail, scale=SCALE), end, **EXACT)
        assert torch.equal(states[-1], end)


@pytest.mark.parametrize("family", ["unet", "flow"])
def test_a_tail_starts_where_training_noise_of_its_time_lies(load, family):
    """alpha[0] x0 + sigma[0] eps is what `add_noise` gives at t[0]; an eta between two steps takes the lower one."""
    generator = load(family)
    grid = generator.grid(N, generator.latent_shape(16, 16))
    between = float(grid.sigma[1] + grid.sigma[2]) / 2
    tail = grid.from_sigma(between)
    assert torch.equal(tail.sigma, grid.sigma[2:])
    x0, noise = torch.randn(2, 1, *generator.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))
    start = tail.alpha[0] * x0 + tail.sigma[0] * noise
    torch.testing.assert_close(start, generator.add_noise(x0, noise, tail.t[:1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no step starts at sigma 0 or below; the last of 4 steps starts at"):
        grid.from_sigma(0)


def test_a_condition_per_step(double):
    generator, grid, first, x = double()
    second = generator.encode_prompts(PROMPTS[::-1])
    calls = []

    def cond(index):
        calls.append(index)
        return first if index < 2 else second

    end = rollout(generator, cond, x, grid, scale=SCALE)
    loss_of(end).backward()
    assert calls == list(range(N))  # the backward pass repeats no encoding
    with torch.no_grad():
        middle = rollout(generator, first, x, grid[:2], scale=SCALE)
        torch.testing.assert_close(rollout(generator, second, middle, grid[2:], scale=SCALE), end, **EXACT)


def test_a_hook_sees_each_step_once(double):
    """Also when the backward pass repeats the steps; tensor hooks on the state see its gradient, latest first."""
    generator, grid, cond, x = double()
    steps, order = [], []

    def watch(index, state, prediction):
        steps.append((index, state.shape, prediction.shape))
        state.register_hook(lambda _: order.append(index))

    loss_of(rollout(generator, cond, x, grid, scale=SCALE, on_step=watch)).backward()
    assert steps == [(index, x.shape, x.shape) for index in range(N)]
    assert order == list(reversed(range(N)))


def test_a_hook_caps_the_gradient_of_each_row(double):
    """By tensor hooks, and by a replacement of the state whose gradient is scaled: one result."""
    generator, grid, cond, x = double()
    norms = []

    def capped(grad):
        norm = grad.flatten(1).norm(dim=1)
        factor = (0.5 / norm).clamp(max=1)
        norms.append(norm * factor)
        return grad * factor.reshape(-1, 1, 1, 1)

    class Cap(torch.autograd.Function):
        @staticmethod
        def forward(_, state):
            return state.clone()

        @staticmethod
        def backward(_, grad):
            return capped(grad)

    def watch(_, state, __):
        state.register_hook(capped)

    ends = [
        rollout(generator, cond, x, grid, scale=SCALE, on_step=hook)
        for hook in (watch, lambda _, state, __: Cap.apply(state))
    ]
    first, second = (gradients(end, leaves(generator, cond, x)) for end in ends)
    assert len(norms) == 2 * N
    assert max(float(norm.max()) for norm in norms) <= 0.5 + 1e-12
    for grad, other in zip(first, second, strict=True):
        torch.testing.assert_close(grad, other, **EXACT)
    exact = gradients(rollout(generator, cond, x, grid, scale=SCALE), leaves(generator, cond, x))
    assert (exact[-1] - first[-1]).abs().max() > 1e-3


def test_few_step_families_need_a_source_of_noise(load):
    generator = load("lcm")
    shape = generator.latent_shape(16, 16)
    cond, x = generator.encode_prompts(PROMPTS), torch.zeros(2, *shape)
    with torch.no_grad(), pytest.raises(ConfigError, match="LCM draws fresh noise in each step: give 2 sources, not 0"):
        rollout(generator, cond, x, generator.grid(2, shape), scale=8.5)


# --- reference inside a checkpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_the_reference_in_a_checkpoint(load, kind, blocks):
    """Its gradient to the state is the base model's; with and without checkpoints of single blocks inside."""
    generator, base = load("flow"), load("flow")
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([0.3, 0.7])
    if kind == "lora":
        generator.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
        stir(generator.net)
    else:
        generator.model.freeze_copy()
        with torch.no_grad():
            generator.net.proj_out.weight.mul_(1.3)
    if blocks:
        generator.model.activation_checkpointing_enable()
    x = torch.randn(2, *generator.latent_shape(16, 16), generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(base.model(x, t, cond).square().sum(), x)
    call = lambda state: generator.model(state, t, cond, reference=True)  # noqa: E731
    (grad,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    (policy,) = torch.autograd.grad(generator.model(x, t, cond).square().sum(), x)
    assert (policy - expected).abs().max() > 1e-3
    assert all(p.requires_grad for name, p in generator.net.named_parameters() if "lora_" in name)


def test_the_context_does_not_reach_into_a_backward_pass(load):
    """Why `reference=True` exists."""
    generator = load("flow")
    generator.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([0.3, 0.7])
    x = torch.zeros(2, *generator.latent_shape(16, 16)).requires_grad_()
    with generator.reference():
        prediction = checkpoint(lambda state: generator.model(state, t, cond), x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        prediction.sum().backward()
