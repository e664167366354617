"""Averages in the form in which other libraries expect them; each module imports what it needs of its library.

diffusers: EMAModel.
ema_pytorch: EMA.
ignite: EMAHandler.
lightning: FastWeightAveraging, for WeightAveraging and EMAWeightAveraging.
timm: ModelEmaV3.
torch_ema: ExponentialMovingAverage.
transformers: WeightAveragingCallback.
ultralytics: ModelEMA.
"""
