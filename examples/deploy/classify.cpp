// Runs an exported file with onnxruntime's C++ interface.
//
//     g++ -std=c++17 classify.cpp -I ORT/include -L ORT/lib -lonnxruntime -o classify
//     ./classify slim.onnx images.f32 64
//
// `images.f32` has samples as float32, one behind the other (`images.astype("float32").tofile("images.f32")` in numpy),
// and 64 is how many are run at once. It prints the class of each: the index of its highest score.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int count, char** given) {
  if (count != 4) {
    std::cerr << "usage: classify MODEL.onnx IMAGES.f32 BATCH\n";
    return 2;
  }
  std::ifstream file(given[2], std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << given[2] << "\n";
    return 1;
  }
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<float> pixels(bytes.size() / sizeof(float));
  std::copy_n(bytes.data(), pixels.size() * sizeof(float), reinterpret_cast<char*>(pixels.data()));

  try {
    Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "classify");
    Ort::Session session(environment, given[1], Ort::SessionOptions{});
    Ort::AllocatorWithDefaultOptions allocator;
    const auto input = session.GetInputNameAllocated(0, allocator);
    const auto output = session.GetOutputNameAllocated(0, allocator);
    const char* inputs[] = {input.get()};
    const char* outputs[] = {output.get()};

    // A size of -1 is free: the batch, which comes first.
    auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    size_t sample = 1;
    for (size_t dim = 1; dim < shape.size(); ++dim) sample *= static_cast<size_t>(shape[dim]);
    const size_t batch = std::stoul(given[3]);
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

    for (size_t first = 0; first * sample < pixels.size(); first += batch) {
      const size_t left = pixels.size() / sample - first;
      shape[0] = static_cast<int64_t>(std::min(batch, left));
      auto tensor = Ort::Value::CreateTensor<float>(memory, pixels.data() + first * sample, shape[0] * sample,
                                                    shape.data(), shape.size());
      const auto found = session.Run(Ort::RunOptions{}, inputs, &tensor, 1, outputs, 1);
      const float* scores = found[0].GetTensorData<float>();
      const size_t classes = found[0].GetTensorTypeAndShapeInfo().GetElementCount() / shape[0];
      for (int64_t row = 0; row < shape[0]; ++row) {
        const float* own = scores + row * classes;
        std::cout << std::max_element(own, own + classes) - own << "\n";
      }
    }
  } catch (const std::exception& error) {  // what onnxruntime throws is one, too
    std::cerr << error.what() << "\n";
    return 1;
  }
}
