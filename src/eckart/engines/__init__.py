"""Other people's engines: ONNX, OpenVINO, vLLM, PEFT."""
