import pytest
import torch

from trifold.sparsity.owl import outlier_share, owl


def test_shares_by_hand():
    scores = [torch.ones(3, 3), torch.tensor([[101.0]])]  # a mean of 11
    assert outlier_share(scores, 5.0) == 10 and outlier_share(scores, 10.0) == 0
    assert outlier_share([torch.ones(4)]) == 0


def test_the_mean_is_exact_and_blocks_with_outliers_keep_more():
    found = owl([1.0, 3.0, 2.0], 0.7)
    assert sum(found) / 3 == pytest.approx(0.7) and max(found) - min(found) == pytest.approx(0.16)
    assert found == pytest.approx([0.78, 0.62, 0.7])
    assert owl([2.0, 2.0], 0.5) == [0.5, 0.5]
