"""Each of the nine labels means what it says, for pictures whose transforms are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ect.data import AugmentPipe
from ect.errors import UserError

SIZE = 32
DRAWN, NOT_DRAWN = 0.0, 0.999
UNIFORMS = ("x_flip", "y_flip", "scale", "rotate", "angle", "stretch", "axis", "shift")
NORMALS = ("scale", "stretch", "right", "down")


def numbers(n: int = 1, normal: dict[str, float] | None = None, **uniform: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers for n images: nothing drawn but what is named, in x, y order."""
    u = [uniform.get(name, NOT_DRAWN) for name in UNIFORMS]
    g = [(normal or {}).get(name, 0.7) for name in NORMALS]
    return torch.tensor([u] * n), torch.tensor([g] * n)


def coordinates(height: int = SIZE, width: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres, right and down from the image's centre, in pixels."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return x, y


def blob(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A smooth lopsided spot, gone at the edges of 32x32: [1, 1, H, W]."""
    return (2 * torch.exp(-((x - 2) ** 2 / 18 + (y + 1) ** 2 / 9 + (x - 2) * (y + 1) / 20)))[None, None]


def random_batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 16, 16, generator=g) * 2 - 1
    uniform = torch.rand(n, AugmentPipe.uniforms, generator=g)
    return images, uniform, torch.randn(n, AugmentPipe.normals, generator=g)


def test_nothing_drawn_leaves_the_image_bit_for_bit() -> None:
    images = random_batch(3)[0]
    out, labels = AugmentPipe(0.12)(images, *numbers(3))
    assert torch.equal(out, images)
    assert labels.dtype == torch.float32 and torch.equal(labels, torch.zeros(3, 9))


@pytest.mark.parametrize(("size", "bound"), [(8, 1e-5), (32, 4e-5), (64, 1e-4)])
def test_resampling_by_the_identity_is_rounding_noise(size: int, bound: float) -> None:
    """Measured on white noise: 2e-6 at 8 pixels, 1e-5 at 32, 3e-5 at 64, from the rounding of coordinates."""
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = AugmentPipe(0.12).warp(images, torch.eye(2).expand(4, 2, 2), torch.zeros(4, 2))
    assert (out - images).abs().max() < bound


def test_flips_are_exact() -> None:
    images = random_batch(2)[0]
    pipe = AugmentPipe(0.12)
    for name, column, axis in (("x_flip", 0, 3), ("y_flip", 1, 2)):
        uniform, normal = numbers(2)
        uniform[:, UNIFORMS.index(name)] = DRAWN
        out, labels = pipe(images, uniform, normal)
        assert torch.equal(out, images.flip(axis))
        assert torch.equal(labels, torch.eye(9)[[column, column]])


def test_shift_by_whole_pixels_is_the_reflected_image_moved_right_and_down() -> None:
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    right, down = 3 / 2, -2 / 4  # in units of 0.125 of 16 and 32 pixels: 3 to the right, 2 up
    out, labels = AugmentPipe(0.12)(images, *numbers(2, {"right": right, "down": down}, shift=DRAWN))
    reflected = torch.nn.functional.pad(images, [15, 15, 31, 31], mode="reflect")
    torch.testing.assert_close(out, reflected[:, :, 31 + 2 : 63 + 2, 15 - 3 : 31 - 3], atol=2e-5, rtol=0)
    assert labels.tolist() == [[0.0] * 7 + [right, down]] * 2


def test_beyond_the_margin_lies_grey() -> None:
    out, _ = AugmentPipe(0.12)(torch.ones(1, 1, 8, 8), *numbers(1, {"right": 40.0, "down": 0.0}, shift=DRAWN))
    assert torch.equal(out, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(("angle", "turns"), [(0.25, 1), (0.0, 2), (0.75, -1)])
def test_rotation_by_quarter_turns_is_counter_clockwise(angle: float, turns: int) -> None:
    """The filter is not symmetric, its centroid lies 0.05 pixels off: so half a turn ends 0.1 pixels off."""
    image = blob(*coordinates())
    out, labels = AugmentPipe(0.12)(image, *numbers(rotate=DRAWN, angle=angle))
    assert (out - torch.rot90(image, turns, (2, 3))).abs().max() < 0.08
    assert (out - torch.rot90(image, turns + 1, (2, 3))).abs().max() > 0.5
    a = math.pi / 2 * turns
    expected = torch.tensor([[0, 0, 0, math.cos(a) - 1, math.sin(a), 0, 0, 0, 0]])
    torch.testing.assert_close(labels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("w", [1.5, -1.5])
def test_scale_above_one_enlarges(w: float) -> None:
    x, y = coordinates()
    out, labels = AugmentPipe(0.12)(blob(x, y), *numbers(normal={"scale": w}, scale=DRAWN))
    s = 2 ** (0.2 * w)
    assert (out - blob(x / s, y / s)).abs().max() < 0.03
    assert (out - blob(x, y)).abs().max() > 0.1
    assert labels.tolist() == [[0, 0, w, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("w", [1.5, -1.5])
@pytest.mark.parametrize(("axis", "b"), [(0.5, 0.0), (0.125, math.pi / 2), (0.2, math.pi / 5), (0.45, -0.8 * math.pi)])
def test_stretch_is_along_its_axis(w: float, axis: float, b: float) -> None:
    x, y = coordinates()
    out, labels = AugmentPipe(0.12)(blob(x, y), *numbers(normal={"stretch": w}, stretch=DRAWN, axis=axis))
    s = 2 ** (0.2 * w)
    along, across = x * math.cos(b) - y * math.sin(b), x * math.sin(b) + y * math.cos(b)  # y points down
    along, across = along / s, across * s
    expected = blob(along * math.cos(b) + across * math.sin(b), across * math.cos(b) - along * math.sin(b))
    assert (out - expected).abs().max() < 0.03
    assert (out - blob(x, y)).abs().max() > 0.1
    row = torch.tensor([[0, 0, 0, 0, 0, w * math.cos(b), w * math.sin(b), 0, 0]])
    torch.testing.assert_close(labels, row, atol=1e-6, rtol=0)


def test_order_is_scale_rotation_stretch_shift() -> None:
    """The inverse equals the product of single inverses, computed with plain matrices in fp64."""
    w_scale, w_stretch, angle, axis = 0.8, -1.1, 0.3, 0.1
    uniform, normal = numbers(
        normal={"scale": w_scale, "stretch": w_stretch, "right": 0.4, "down": -0.6},
        scale=DRAWN,
        rotate=DRAWN,
        angle=angle,
        stretch=DRAWN,
        axis=axis,
        shift=DRAWN,
    )
    _, inverse, shift = AugmentPipe(0.12).draw(uniform, normal)

    def turn(a: float) -> np.ndarray:  # counter-clockwise as seen, for (right, down)
        return np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])

    b = math.pi * (1 - 4 * axis)
    stretch = turn(b) @ np.diag([2 ** (0.2 * w_stretch), 2 ** (-0.2 * w_stretch)]) @ turn(-b)
    forward = stretch @ turn(math.pi * (1 - 2 * angle)) * 2 ** (0.2 * w_scale)
    np.testing.assert_allclose(inverse[0].numpy(), np.linalg.inv(forward), atol=1e-6)
    np.testing.assert_allclose(shift[0].numpy(), [0.4 * 0.125, -0.6 * 0.125], rtol=1e-6)


def test_shift_comes_after_the_rest() -> None:
    x, y = coordinates()
    uniform, normal = numbers(
        normal={"scale": 1.5, "right": 1.0, "down": 0.5}, scale=DRAWN, rotate=DRAWN, angle=0.25, shift=DRAWN
    )
    out, _ = AugmentPipe(0.12)(blob(x, y), uniform, normal)
    s = 2**0.3
    x, y = (x - 4) / s, (y - 2) / s  # back from the shift by 4 and 2 pixels, and from the scale
    assert (out - blob(-y, x)).abs().max() < 0.06  # back from a quarter turn counter-clockwise


def test_rates_over_many_draws() -> None:
    n, p = 200_000, 0.12
    g = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(n, AugmentPipe.uniforms, generator=g), torch.randn(n, AugmentPipe.normals, generator=g)
    labels, _, _ = AugmentPipe(p).draw(uniform, normal)
    drawn = (labels != 0).double()
    rates = [drawn[:, i].mean().item() for i in (0, 1, 2, 4, 5, 7)]
    assert rates == pytest.approx([0.5, p / 2, p, p, p, p], abs=0.005)
    assert drawn[:, 6].mean().item() == pytest.approx(p / 2, abs=0.005)  # the stretch's axis is turned half the time
    assert torch.equal(drawn[:, 7], drawn[:, 8])
    moments = [labels[drawn[:, i] == 1, i].std().item() for i in (2, 7, 8)]
    assert moments == pytest.approx([1, 1, 1], abs=0.02)
    angles = torch.atan2(labels[:, 4], labels[:, 3] + 1)[drawn[:, 4] == 1]
    assert torch.histc(angles, 8, -math.pi, math.pi).div(len(angles)).tolist() == pytest.approx([1 / 8] * 8, abs=0.01)
    # Independent draws: two of the parts at once with probability p^2.
    assert (drawn[:, 2] * drawn[:, 7]).mean().item() == pytest.approx(p * p, abs=0.002)


def test_deterministic_and_independent_of_the_rest_of_the_batch() -> None:
    batch = random_batch(12)
    pipe = AugmentPipe(0.8)
    images, labels = pipe(*batch)
    again, _ = pipe(*batch)
    assert torch.equal(images, again)
    for rows in (slice(0, 5), slice(11, 12)):
        part, part_labels = pipe(*(values[rows] for values in batch))
        torch.testing.assert_close(part, images[rows], atol=1e-6, rtol=0)
        assert torch.equal(part_labels, labels[rows])


def test_shapes_and_host_know_nothing_of_the_numbers() -> None:
    """Fake tensors have no values: any look at one raises."""
    with FakeTensorMode():
        images, labels = AugmentPipe(0.12)(torch.empty(4, 1, 8, 8), torch.empty(4, 8), torch.empty(4, 4))
    assert images.shape == (4, 1, 8, 8) and labels.shape == (4, 9)
    assert len(UNIFORMS) == AugmentPipe.uniforms and len(NORMALS) == AugmentPipe.normals
    assert AugmentPipe(0.12).state_dict() == {}


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, math.nan])
def test_probability_out_of_range(p: float) -> None:
    with pytest.raises(UserError, match=f"--data.augment {p}: expected a probability"):
        AugmentPipe(p)
