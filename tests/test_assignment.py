import pytest
import torch

from bmsn_zoo.assignment import assign, update_score

SHAPES = [(36, 2), (36, 4), (455, 8), (3, 5)]
FAMILIES = {
    "uniform": lambda g, n, m: torch.rand(n, m, generator=g, dtype=torch.float64),
    "near ties": lambda g, n, m: 0.8 + 1e-6 * torch.rand(n, m, generator=g, dtype=torch.float64),
    "ties": lambda g, n, m: torch.randint(0, 4, (n, m), generator=g).double() / 3,
    "equal": lambda g, n, m: torch.ones(n, m, dtype=torch.float64),
    "zero or one": lambda g, n, m: torch.randint(0, 2, (n, m), generator=g).double(),
    "rows and columns": lambda g, n, m: (
        0.5 * torch.rand(n, 1, generator=g) + 0.4 * torch.rand(1, m, generator=g) + 0.1 * torch.rand(n, m, generator=g)
    ).double(),
    "one supernet best": lambda g, n, m: torch.cat([torch.ones(n, 1), torch.zeros(n, m - 1)], 1).double(),
    "one layout apart": lambda g, n, m: torch.cat([torch.zeros(n - 1, m), torch.eye(1, m)]).double(),
    "a search": lambda g, n, m: 1 - 0.3 * torch.rand(n, m, generator=g, dtype=torch.float64) ** 8,
}


def scores_of(family, shape, seed=0):
    return FAMILIES[family](torch.Generator().manual_seed(seed), *shape)


@pytest.mark.parametrize("sharpness", [0, 1, 30, 100, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_one_and_supernets_are_used_equally(family, shape, sharpness):
    for seed in range(3):
        scores = scores_of(family, shape, seed)
        before = scores.clone()
        assignment = assign(scores, sharpness)
        assert torch.equal(scores, before)
        assert assignment.shape == shape
        assert assignment.dtype == torch.float64
        assert (assignment >= 0).all()
        torch.testing.assert_close(assignment.sum(1), torch.ones(shape[0], dtype=torch.float64), rtol=0, atol=1e-12)
        assert (assignment.mean(0) * shape[1] - 1).abs().max() <= 0.01


@pytest.mark.parametrize("sharpness", [0, 300])
def test_one_supernet_gets_everything(sharpness):
    assert torch.equal(assign(torch.rand(36, 1), sharpness), torch.ones(36, 1, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sharpness_means_no_preference(family):
    scores = scores_of(family, (36, 4))
    torch.testing.assert_close(assign(scores, 0), torch.full((36, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharpness", [1, 20])
def test_is_the_fixed_point_of_the_published_iteration(family, sharpness):
    scores = scores_of(family, (36, 4))
    plain = (sharpness * scores).softmax(1)
    for _ in range(5000):
        plain = plain / plain.mean(0)
        plain = plain / plain.sum(1, keepdim=True)
    assert (plain.mean(0) * 4 - 1).abs().max() < 1e-9, "the yardstick itself has not converged"
    torch.testing.assert_close(assign(scores, sharpness, tolerance=1e-9), plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sharpness", [1, 20, 100])
def test_is_a_softmax_with_one_offset_for_each_supernet(sharpness):
    scores = scores_of("a search", (36, 4))
    offsets = assign(scores, sharpness).log() - sharpness * scores
    offsets = offsets - offsets[:, :1]  # a row's own constant does not matter to its softmax
    torch.testing.assert_close(offsets, offsets[:1].expand_as(offsets), rtol=0, atol=1e-8)


def test_order_of_layouts_and_supernets_does_not_matter():
    scores = scores_of("uniform", (36, 4))
    layouts, supernets = torch.randperm(36), torch.randperm(4)
    expected = assign(scores, 50, tolerance=1e-9)[layouts][:, supernets]
    torch.testing.assert_close(
        assign(scores[layouts][:, supernets], 50, tolerance=1e-9), expected, rtol=1e-6, atol=1e-9
    )


def test_the_better_a_supernet_is_at_a_layout_the_likelier():
    scores = scores_of("uniform", (36, 2))
    advantage = scores[:, 0] - scores[:, 1]
    likelihood = assign(scores, 30)[:, 0]
    assert torch.equal(advantage.argsort(), likelihood.argsort())
    assert likelihood.min() < 0.01
    assert likelihood.max() > 0.99


def test_a_supernet_that_is_better_everywhere_is_not_used_more():
    scores = torch.rand(36, 4, dtype=torch.float64) / 2
    shifted = scores + torch.tensor([0.0, 0.1, 0.2, 0.5])
    torch.testing.assert_close(assign(shifted, 100, tolerance=1e-9), assign(scores, 100, tolerance=1e-9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_must_be_finite(bad):
    scores = torch.ones(36, 4)
    scores[3, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        assign(scores, 10)


@pytest.mark.parametrize("scores", [torch.ones(36), torch.ones(2, 3, 4), torch.ones(0, 4), torch.ones(36, 0)])
def test_scores_must_be_a_matrix(scores):
    with pytest.raises(ValueError, match="matrix"):
        assign(scores, 10)


@pytest.mark.parametrize("sharpness", [-1, -1e-9, float("nan"), float("inf")])
def test_sharpness_must_be_finite_and_not_negative(sharpness):
    with pytest.raises(ValueError, match="sharpness"):
        assign(torch.ones(36, 4), sharpness)


def test_iteration_limit_is_an_error_with_the_deviation():
    with pytest.raises(RuntimeError, match=r"after 1 steps.*\d% off"):
        assign(scores_of("one supernet best", (36, 4)), 300, max_iters=1)


def test_update_moves_one_score():
    scores = torch.ones(36, 4, dtype=torch.float64)
    update_score(scores, 5, 2, accuracy=0.5, momentum=0.9)
    assert scores[5, 2] == pytest.approx(0.95)
    update_score(scores, 5, 2, accuracy=0.5, momentum=0.9)
    assert scores[5, 2] == pytest.approx(0.905)
    assert (scores == 1).sum() == 36 * 4 - 1
