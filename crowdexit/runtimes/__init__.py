"""What runs a network, stage by stage: eager PyTorch, torch.compile, OpenVINO, ONNX Runtime.

``arrays`` and ``engines`` know nothing of PyTorch, so that exported stages run without it.
"""
