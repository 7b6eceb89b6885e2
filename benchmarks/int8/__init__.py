"""Networks in eight bits and in float32: accuracy, file size and latency in ONNX Runtime."""
