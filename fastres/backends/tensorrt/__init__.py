"""The TensorRT backend: Graph → ONNX → an engine that TensorRT builds."""
