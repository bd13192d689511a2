"""Equal but for rounding: the tolerance follows the size of what is compared, whichever processor computes it."""

import torch


def close(found, expected, tolerance=1e-5):
    """Fail unless both have one shape and differ by no more than `tolerance` of the largest expected value."""
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()), check_dtype=False)
