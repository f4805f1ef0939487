import pytest
import torch

from tests.sparsity.problems import correlated, error, solve
from trifold.core import native
from trifold.core.columns import Kept, NearestCode
from trifold.core.obs import damped, inverse_cholesky, quadratic_loss, sweep
from trifold.core.pattern import Pattern
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.quantizers import GPTQ
from trifold.sparsity import SparseGPT, Wanda
from trifold.sparsity.sparsegpt import prune_in_order, saliency_ahead


def in_order(weight, upper, pattern, scheme=None, block=128, share=0.5, scope="matrix"):
    """mask, decided, loss; in the dtype of the weight."""
    keep = torch.ones_like(weight.T, memory_format=torch.contiguous_format)
    decide = Kept(keep)
    if scheme is not None:
        scale, zero = fit_ranges(weight.float(), scheme)
        width = scheme.group_width(weight.shape[1])
        group = [j // width for j in range(weight.shape[1])]
        decide = NearestCode(scale.T.to(weight), zero.T.to(weight), group, scheme, keep)
    return prune_in_order(weight, upper, Pattern.parse(pattern), share, scope, keep, decide, block)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x8"])
@pytest.mark.parametrize("scheme", [None, Scheme(4, 16)])
def test_the_ledger_is_exact(pattern, scheme):
    weight, gram = correlated(rows=9, columns=172)
    weight, (upper, damping) = weight.double(), inverse_cholesky(gram)
    mask, decided, loss = in_order(weight, upper, pattern, scheme)
    difference, hessian = weight - decided, damped(gram, damping.ratio)
    assert (decided[~mask] == 0).all() and mask.double().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(loss, ((difference @ hessian) * difference).sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [1, 3, 16, 172, 1000])
def test_with_the_mask_given_the_block_size_changes_nothing(block):
    weight, gram = correlated(rows=7, columns=172)
    weight, (upper, _) = weight.double(), inverse_cholesky(gram)
    keep = (torch.rand(172, 7, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    expected, loss = sweep(weight, upper, Kept(keep), 128)
    decided, other = sweep(weight, upper, Kept(keep), block)
    torch.testing.assert_close(decided, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, loss, rtol=1e-11, atol=1e-12)


def test_n_of_m_sees_the_errors_before_it():
    """The choice in each quad is the best for the weights as they are when its turn comes."""
    weight, gram = correlated(rows=5, columns=16)
    weight, (upper, _) = weight.double(), inverse_cholesky(gram)
    mask, _, _ = in_order(weight, upper, "2:4")
    current = weight.clone()
    for start in range(0, 16, 4):
        scores = current[:, start : start + 4] ** 2 / upper.diagonal()[start : start + 4] ** 2
        least = scores.argsort(1)[:, :2]
        assert not mask[:, start : start + 4].gather(1, least).any()
        keep = torch.cat([mask[:, : start + 4].T.double(), torch.ones(12 - start, 5).double()])
        current, _ = sweep(weight, upper, Kept(keep), 4)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_mask_refit_beats_one_pass_beats_the_mask_alone(seed):
    weight, gram = correlated(seed)
    upper, damping = inverse_cholesky(gram)
    mask = solve(Wanda(refit=False), weight, gram).mask
    hessian = damped(gram, damping.ratio)
    swept, _ = sweep(weight.double(), upper, Kept(mask.T.double()))
    refitted = solve(Wanda(dtype="float32"), weight, gram).dequantize().double()
    losses = [float(quadratic_loss(weight.double() - q, hessian)) for q in (refitted, swept, weight.double() * mask)]
    assert losses[0] < 0.6 * losses[1] and losses[1] < 0.8 * losses[2]


def test_nothing_dropped_is_gptq():
    weight, gram = correlated(rows=16, columns=96)
    scheme = Scheme(4, 32)
    ours = solve(SparseGPT(sparsity=0.0, refit=False), weight, gram, scheme)
    plain = solve(GPTQ(act_order=False, refine=0, norm=2.4, steps=80), weight, gram, scheme)
    assert (
        ours.mask.all() and torch.equal(ours.values.codes, plain.codes) and torch.equal(ours.values.scale, plain.scale)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_after_the_refit_beats_one_joint_pass(seed):
    weight, gram = correlated(seed)
    for pattern in ("2:4", "unstructured", "1x16"):
        scheme = Scheme(4, 32)
        joint = error(SparseGPT(pattern=pattern, refit=False), weight, gram, scheme)
        assert error(SparseGPT(pattern=pattern), weight, gram, scheme) < 0.7 * joint


def test_the_saliency_ahead_is_the_cost_for_what_is_not_final():
    weight, gram = correlated(rows=3, columns=12)
    upper, damping = inverse_cholesky(gram)
    hessian, pattern = damped(gram, damping.ratio), Pattern.parse("1x4")
    costs = saliency_ahead(weight.double(), upper, pattern)
    for group in range(3):
        rest = hessian[4 * group :, 4 * group :].inverse()[:4, :4]
        part = weight[:, 4 * group : 4 * group + 4].double()
        torch.testing.assert_close(costs[:, group], ((part @ rest.inverse()) * part).sum(1))


@pytest.mark.skipif(native.library("columns") is None, reason="no C compiler")
@pytest.mark.parametrize("rows, columns, block", [(1, 7, 4), (5, 1, 8), (257, 43, 16), (600, 97, 128)])
@pytest.mark.parametrize("rounded", [False, True])
def test_compiled_sweeps_are_the_torch_ones(rows, columns, block, rounded, monkeypatch):
    weight, gram = correlated(rows=rows, columns=max(columns, 4))
    weight, upper = weight[:, :columns], inverse_cholesky(gram[:columns, :columns])[0].float()
    keep = (torch.rand(columns, rows, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    scale, zero = fit_ranges(weight, Scheme(8, 16))

    def run():
        group = [j // 16 for j in range(columns)]
        return sweep(
            weight, upper, NearestCode(scale.T, zero.T, group, Scheme(8, 16), keep) if rounded else Kept(keep), block
        )

    decided, loss = run()
    for kind in (Kept, NearestCode):
        monkeypatch.setattr(kind, "fix", lambda *_: False)
    expected, expected_loss = run()
    torch.testing.assert_close(decided, expected, rtol=0, atol=float(scale.max()) if rounded else 1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-2, atol=1e-5)
    assert (decided[(keep == 0).T] == 0).all()
