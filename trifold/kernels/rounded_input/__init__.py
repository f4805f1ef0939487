"""Products with activations rounded when the layer runs: per token, or with a scale from calibration."""
