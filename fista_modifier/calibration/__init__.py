"""From calibration batches to the Gram matrices of X and X*."""
