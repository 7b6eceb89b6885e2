"""Networks in eight bits beside float32: accuracy, file size and latency in ONNX Runtime."""
