// What each binding file adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace twinjet::bindings {

void BindDoor(pybind11::module_& module);  // only where the door is built
void BindEpp(pybind11::module_& module);
void BindKv(pybind11::module_& module);
void BindProcess(pybind11::module_& module);
void BindRequests(pybind11::module_& module);
void BindSampler(pybind11::module_& module);
void BindSamplerCuda(pybind11::module_& module);
void BindSamplerSeats(pybind11::module_& module);
void BindSched(pybind11::module_& module);
void BindStream(pybind11::module_& module);
void BindVllm(pybind11::module_& module);
void BindVllmWire(pybind11::module_& module);

}  // namespace twinjet::bindings
