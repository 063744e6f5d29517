// A CUDA device that computes nothing: what autograd asks of a device before it runs on FakeTensorMode's tensors.
// A build of torch without CUDA answers "not linked with support for cuda" otherwise.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::DeviceIndex devices = 1, current = 0;

struct FakeGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(c10::DeviceType::CUDA, current);
    current = device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, current); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override {
    c10::Device indexed(c10::DeviceType::CUDA, device.has_index() ? device.index() : current);
    return c10::Stream(c10::Stream::DEFAULT, indexed);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }
};

struct FakeHooks : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

namespace at {
using FakeHooks = ::FakeHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
}  // namespace at

static FakeGuard guard;

extern "C" void install(int count) {
  devices = static_cast<c10::DeviceIndex>(count);
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
}
