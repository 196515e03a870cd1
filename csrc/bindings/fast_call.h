// Methods as vectorcall descriptors on a pybind11 class, positional arguments only: pybind11's dispatch
// alone costs several times what such a method needs.
#pragma once

#include <pybind11/pybind11.h>

#include <new>

namespace twinjet::bindings {

using FastArgs = PyObject* const*;

// The C++ object inside `self`; null and TypeError where __init__ has not run.
template <typename Self>
Self* SelfOf(PyObject* self) {
  auto* instance = reinterpret_cast<pybind11::detail::instance*>(self);
  void* found = instance->simple_layout ? instance->simple_value_holder[0] : nullptr;
  if (!found) {
    PyErr_Format(PyExc_TypeError, "this %s was not initialised: call super().__init__()",
                 Py_TYPE(self)->tp_name);
  }
  return static_cast<Self*>(found);
}

inline bool CheckCount(const char* name, Py_ssize_t given, Py_ssize_t least, Py_ssize_t most) {
  if (given >= least && given <= most) return true;
  PyErr_Format(PyExc_TypeError, "%s() takes %zd to %zd positional arguments, not %zd", name, least, most,
               given);
  return false;
}

// The calling convention around a method: argument count, the object, and lack of memory.
template <typename Self, PyObject* (*method)(Self&, FastArgs, Py_ssize_t), size_t kLeast, size_t kMost,
          const char* kName>
PyObject* FastCall(PyObject* self, FastArgs args, Py_ssize_t count) {
  if (!CheckCount(kName, count, kLeast, kMost)) return nullptr;
  Self* object = SelfOf<Self>(self);
  if (!object) return nullptr;
  try {
    return method(*object, args, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

inline void AddFastMethods(pybind11::handle type, std::initializer_list<PyMethodDef*> definitions) {
  for (PyMethodDef* definition : definitions) {
    PyObject* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), definition);
    if (!descriptor) throw pybind11::error_already_set();
    type.attr(definition->ml_name) = pybind11::reinterpret_steal<pybind11::object>(descriptor);
  }
}

}  // namespace twinjet::bindings

// Defines PyMethodDef `method`Def for AddFastMethods.
#define TWINJET_FAST(Self, kName, method, least, most)                                      \
  static constexpr char k##method##Name[] = kName;                                          \
  static PyMethodDef method##Def = {                                                        \
      k##method##Name,                                                                      \
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(                           \
          static_cast<PyObject* (*)(PyObject*, ::twinjet::bindings::FastArgs, Py_ssize_t)>( \
              ::twinjet::bindings::FastCall<Self, method, least, most, k##method##Name>))), \
      METH_FASTCALL, nullptr}
