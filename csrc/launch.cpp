// optima_fast._launch: launches compiled Triton kernels on the host, a call into the driver each.
//
// Triton's own launcher inspects, hashes and converts every argument in Python, and calls a generated
// C function. Here one pass over the arguments writes both the key that tells a kernel's compiled
// variants apart and the bytes that the device gets. kernels/launcher.py compiles what a key has not
// been seen for, or finds it compiled ahead of time.
//
// The driver library is opened when the first kernel is loaded: without it the module imports, and
// works as far as it can.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace optima_fast {
namespace {

// --- the driver: the few entry points of libcuda that a launch needs, by their stable C names

using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;

constexpr int kSharedPerBlockOptin = 97;  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kStaticShared = 1;          // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
constexpr int kMaxDynamicShared = 8;      // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kPreferShared = 1;          // CU_FUNC_CACHE_PREFER_SHARED
constexpr int kSharedWithoutAsking = 48 << 10;

struct Driver {
  int (*error_string)(int, const char**);
  int (*current)(Context*);
  int (*retain)(Context*, int);
  int (*set_current)(Context);
  int (*load)(Module*, const void*);
  int (*get_function)(Function*, Module, const char*);
  int (*device_attribute)(int*, int, int);
  int (*function_attribute)(int*, int, Function);
  int (*set_attribute)(Function, int, int);
  int (*set_cache)(Function, int);
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                Stream, void**, void**);

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(int status, const char* what) const {
    if (status == 0) return;
    const char* text = nullptr;
    error_string(status, &text);
    throw std::runtime_error(std::string(what) + ": " + (text ? text : "unknown error") + " (" +
                             std::to_string(status) + ")");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    find(library, error_string, "cuGetErrorString");
    find(library, current, "cuCtxGetCurrent");
    find(library, retain, "cuDevicePrimaryCtxRetain");
    find(library, set_current, "cuCtxSetCurrent");
    find(library, load, "cuModuleLoadData");
    find(library, get_function, "cuModuleGetFunction");
    find(library, device_attribute, "cuDeviceGetAttribute");
    find(library, function_attribute, "cuFuncGetAttribute");
    find(library, set_attribute, "cuFuncSetAttribute");
    find(library, set_cache, "cuFuncSetCacheConfig");
    find(library, launch, "cuLaunchKernel");
  }

  template <typename T>
  static void find(void* library, T& function, const char* name) {
    function = reinterpret_cast<T>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
};

// --- what Python tells the module once

struct Host {
  py::object device;   // () -> the current device's ordinal
  py::object stream;   // (ordinal) -> the current stream's handle
  py::object scratch;  // (bytes) -> a tensor of so many, kept until the launch is enqueued
  std::unordered_map<PyObject*, std::string> types;  // of tensors, and of a kernel's constants
};

Host& host() {
  static Host* const it = new Host;  // never destroyed: Python may be gone by then
  return *it;
}

PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");
PyObject* const kDtype = PyUnicode_InternFromString("dtype");

[[noreturn]] void raise_from_python() { throw py::error_already_set(); }

// --- one launch's arguments: their key, and what the device gets

class Arguments {
 public:
  Arguments() { key_.reserve(1024); }

  const std::string& key() const { return key_; }

  // A value that the kernel is compiled for.
  void constant(PyObject* x) {
    if (x == Py_None) {
      key_ += 'N';
    } else if (PyBool_Check(x)) {
      key_ += x == Py_True ? 'T' : 'F';
    } else if (PyLong_Check(x)) {
      key_ += 'c';
      key_ += std::to_string(integer(x));
    } else if (PyFloat_Check(x)) {
      double value = PyFloat_AS_DOUBLE(x);
      key_ += 'd';
      key_.append(reinterpret_cast<const char*>(&value), sizeof value);
    } else if (auto found = host().types.find(x); found != host().types.end()) {
      key_ += found->second;
    } else {
      throw py::type_error("a constant must be a number, None or a known dtype, got " + repr(x));
    }
    key_ += ';';
  }

  // A value that the kernel is given; as Triton does, it is compiled anew for one of 1, and for
  // multiples of 16 where `specialise`.
  void value(PyObject* x, bool specialise) {
    if (x == Py_None) {
      key_ += 'N';
    } else if (PyBool_Check(x)) {
      key_ += 'u';
      push(static_cast<std::uint64_t>(x == Py_True));
    } else if (PyLong_Check(x)) {
      number(integer(x), specialise);
    } else if (PyFloat_Check(x)) {
      float narrow = static_cast<float>(PyFloat_AS_DOUBLE(x));
      std::uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      key_ += 'f';
      push(bits);
    } else if (PyTuple_Check(x)) {
      tuple(x, specialise);
    } else {
      pointer(x, specialise);
    }
  }

  // An option of the compiler.
  void option(PyObject* name, PyObject* x) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (!text) raise_from_python();
    key_.append(text, static_cast<std::size_t>(size));
    key_ += '=';
    constant(x);
  }

  void push(std::uint64_t bits) {
    if (count_ == kMost) throw py::value_error("a launch has too many arguments");
    slots_[count_] = bits;
    pointers_[count_] = &slots_[count_];
    ++count_;
  }

  void** pointers() { return pointers_; }

 private:
  static constexpr std::size_t kMost = 512;  // 4 KB, which is what a launch may carry

  static std::string repr(PyObject* x) {
    return py::repr(py::handle(x)).cast<std::string>();
  }

  static long long integer(PyObject* x) {
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    if (overflow) throw py::value_error("an argument must fit 64 bits, got " + repr(x));
    return value;
  }

  void number(long long value, bool specialise) {
    if (specialise && value == 1) {
      key_ += '1';  // part of the kernel
      return;
    }
    bool narrow = value >= INT32_MIN && value <= INT32_MAX;
    key_ += narrow ? 'i' : 'l';
    if (specialise && value % 16 == 0) key_ += 'D';
    push(static_cast<std::uint64_t>(value));  // little-endian: its first four bytes are the int32
  }

  void tuple(PyObject* x, bool specialise) {
    Py_ssize_t size = PyTuple_GET_SIZE(x);
    key_ += '(';
    PyObject* first = size ? PyTuple_GET_ITEM(x, 0) : nullptr;
    std::size_t at = key_.size(), length = 0, slot = count_;
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* item = PyTuple_GET_ITEM(x, i);
      if (i && item == first && pads(first)) {
        // layers are padded with the first
        key_.append(key_, at, length);
        push(slots_[slot]);
        continue;
      }
      value(item, specialise);
      if (!i) length = key_.size() - at;
    }
    key_ += ')';
  }

  static bool pads(PyObject* x) {
    return x != Py_None && !PyLong_Check(x) && !PyFloat_Check(x) && !PyTuple_Check(x);
  }

  void pointer(PyObject* x, bool specialise) {
    PyObject* dtype = PyObject_GetAttr(x, kDtype);
    if (!dtype) raise_from_python();
    auto found = host().types.find(dtype);
    Py_DECREF(dtype);
    if (found == host().types.end())
      throw py::type_error("a tensor must be of a known dtype, got " + repr(x));
    PyObject* address = PyObject_CallMethodNoArgs(x, kDataPtr);
    if (!address) raise_from_python();
    std::uint64_t value = PyLong_AsUnsignedLongLong(address);
    Py_DECREF(address);
    if (PyErr_Occurred()) raise_from_python();
    key_ += '*';
    key_ += found->second;
    if (specialise && value % 16 == 0) key_ += 'D';
    push(value);
  }

  std::string key_;
  std::size_t count_ = 0;
  std::uint64_t slots_[kMost];
  void* pointers_[kMost];
};

// --- a kernel: its parameters, and what has been loaded of it

struct Parameter {
  PyObject* name;  // interned
  bool constant;
  bool specialise;
  py::object fallback;  // null: it must be given
};

struct Loaded {
  Function function;
  unsigned threads;
  unsigned shared;
  std::size_t scratch;  // bytes a program
};

class Launcher {
 public:
  // Parameters: (name, constant, specialise, has a default, default).
  Launcher(std::string name,
           const std::vector<std::tuple<py::str, bool, bool, bool, py::object>>& parameters)
      : name_(std::move(name)) {
    for (const auto& [text, constant, specialise, has, fallback] : parameters) {
      PyObject* interned = text.ptr();
      Py_INCREF(interned);
      PyUnicode_InternInPlace(&interned);
      parameters_.push_back({interned, constant, specialise, has ? fallback : py::object()});
    }
  }

  // None once the kernel is enqueued; else the key of what is to be loaded first.
  py::object operator()(const py::tuple& grid, const py::tuple& args, const py::dict& named) {
    Arguments arguments;
    bind(args, named, arguments);
    int device = py::cast<int>(host().device());
    auto& loaded = loaded_[device];
    auto found = loaded.find(arguments.key());
    if (found == loaded.end()) return py::bytes(arguments.key());
    enqueue(found->second, device, grid, arguments);
    return py::none();
  }

  // The key alone.
  py::bytes key(const py::tuple& args, const py::dict& named) const {
    Arguments arguments;
    bind(args, named, arguments);
    return py::bytes(arguments.key());
  }

  void add(const py::bytes& key, const py::bytes& binary, const std::string& entry,
           unsigned threads, unsigned shared, std::size_t scratch) {
    const Driver& driver = Driver::get();
    int device = py::cast<int>(host().device());
    Context context = nullptr;
    driver.check(driver.current(&context), "cuCtxGetCurrent");
    if (!context) {
      driver.check(driver.retain(&context, device), "cuDevicePrimaryCtxRetain");
      driver.check(driver.set_current(context), "cuCtxSetCurrent");
    }
    Module module = nullptr;
    Function function = nullptr;
    driver.check(driver.load(&module, PyBytes_AS_STRING(binary.ptr())),
                 ("loading " + name_).c_str());
    driver.check(driver.get_function(&function, module, entry.c_str()),
                 ("finding " + entry).c_str());
    int most = 0;
    driver.check(driver.device_attribute(&most, kSharedPerBlockOptin, device),
                 "cuDeviceGetAttribute");
    if (shared > static_cast<unsigned>(most))
      throw std::runtime_error(name_ + " needs " + std::to_string(shared) +
                               " bytes of shared memory, the device has " + std::to_string(most));
    if (shared > kSharedWithoutAsking) {
      int fixed = 0;
      driver.check(driver.set_cache(function, kPreferShared), "cuFuncSetCacheConfig");
      driver.check(driver.function_attribute(&fixed, kStaticShared, function),
                   "cuFuncGetAttribute");
      driver.check(driver.set_attribute(function, kMaxDynamicShared, most - fixed),
                   "cuFuncSetAttribute");
    }
    loaded_[device][std::string(key)] = {function, threads, shared, scratch};
  }

 private:
  void bind(const py::tuple& args, const py::dict& named, Arguments& arguments) const {
    std::size_t given = args.size(), used = 0;
    if (given > parameters_.size())
      throw py::type_error(name_ + " takes " + std::to_string(parameters_.size()) +
                           " arguments, got " + std::to_string(given));
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& p = parameters_[i];
      PyObject* x;
      if (i < given) {
        x = PyTuple_GET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i));
      } else if ((x = PyDict_GetItemWithError(named.ptr(), p.name))) {
        ++used;
      } else if (!(x = p.fallback.ptr())) {
        if (PyErr_Occurred()) raise_from_python();
        throw py::type_error(name_ + " needs " + PyUnicode_AsUTF8(p.name));
      }
      if (p.constant)
        arguments.constant(x);
      else
        arguments.value(x, p.specialise);
    }
    if (used == named.size()) return;
    PyObject *name, *x;
    Py_ssize_t position = 0;
    while (PyDict_Next(named.ptr(), &position, &name, &x))
      if (!is_parameter(name)) arguments.option(name, x);
  }

  bool is_parameter(PyObject* name) const {
    for (const Parameter& p : parameters_)
      if (p.name == name) return true;
    for (const Parameter& p : parameters_)
      if (PyUnicode_Compare(p.name, name) == 0) return true;
    return false;
  }

  void enqueue(const Loaded& it, int device, const py::tuple& grid, Arguments& arguments) {
    unsigned size[3] = {1, 1, 1};
    for (std::size_t i = 0; i < grid.size() && i < 3; ++i) size[i] = py::cast<unsigned>(grid[i]);
    if (!size[0] || !size[1] || !size[2]) return;
    py::object memory;
    std::uint64_t address = 0;
    if (it.scratch) {
      memory = host().scratch(std::size_t{size[0]} * size[1] * size[2] * it.scratch);
      address = py::cast<std::uint64_t>(memory.attr("data_ptr")());
    }
    // every Triton kernel ends with two pointers, of scratch memory and of a profiler's; a driver
    // reads as many as the kernel has
    arguments.push(address);
    arguments.push(0);
    auto stream = reinterpret_cast<Stream>(py::cast<std::uintptr_t>(host().stream(device)));
    const Driver& driver = Driver::get();
    int status;
    {
      py::gil_scoped_release release;  // a full queue waits for the device
      status = driver.launch(it.function, size[0], size[1], size[2], it.threads, 1, 1, it.shared,
                             stream, arguments.pointers(), nullptr);
    }
    driver.check(status, ("launching " + name_).c_str());
  }

  std::string name_;
  std::vector<Parameter> parameters_;
  std::unordered_map<int, std::unordered_map<std::string, Loaded>> loaded_;  // by device, by key
};

void configure(py::object device, py::object stream, py::object scratch, const py::dict& types) {
  host().device = std::move(device);
  host().stream = std::move(stream);
  host().scratch = std::move(scratch);
  for (const auto& [type, name] : types) {
    py::object kept = py::reinterpret_borrow<py::object>(type);
    host().types[kept.release().ptr()] = py::cast<std::string>(name);
  }
}

}  // namespace
}  // namespace optima_fast

PYBIND11_MODULE(_launch, m) {
  using namespace optima_fast;
  using namespace pybind11::literals;

  m.doc() = "Launches of compiled Triton kernels.";
  m.attr("ABI") = 1;  // kernels/launcher.py refuses a stale build of another number
  m.def("configure", &configure, "device"_a, "stream"_a, "scratch"_a, "types"_a,
        "How to find the current device and stream, get memory, and what dtypes are called.");
  m.def("has_driver", [] {
    try {
      Driver::get();
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }, "Whether the CUDA driver's library is there.");
  py::class_<Launcher>(m, "Launcher")
      .def(py::init<std::string,
                    const std::vector<std::tuple<py::str, bool, bool, bool, py::object>>&>(),
           "name"_a, "parameters"_a)
      .def("__call__", &Launcher::operator(), "grid"_a, "args"_a, "named"_a,
           "Enqueue; or return the key of what must be added first.")
      .def("key", &Launcher::key, "args"_a, "named"_a)
      .def("add", &Launcher::add, "key"_a, "binary"_a, "entry"_a, "threads"_a, "shared"_a,
           "scratch"_a, "Load a binary on the current device for a key.");
}
