"""From a module to a file and back: ONNX with its verification, and archives that load without the model's source."""
