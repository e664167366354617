"""Averages in the form in which other libraries expect them; each module imports what it needs of its library.

ema_pytorch: EMA.
lightning: FastWeightAveraging, for WeightAveraging and EMAWeightAveraging.
torch_ema: ExponentialMovingAverage.
"""
