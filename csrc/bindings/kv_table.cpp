// twinjet._core.BlockTable: a checked, read-only look into a sequence's block table. What it exports
// holds the table's memory, so it outlives the sequence; the object itself raises once that is freed.
#include <pybind11/numpy.h>

#include <memory>
#include <string>

#include "kv_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

struct BlockTable {
  py::object manager_object;  // keeps the manager alive
  kv::BlockManager* manager;
  kv::SequenceId id;
};

// Null and KeyError once the sequence is freed.
const kv::Sequence* Live(const BlockTable& table) {
  const kv::Sequence* sequence = table.manager->FindSequence(table.id);
  if (!sequence) RaiseUnknownSequence(table.id);
  return sequence;
}

const kv::Sequence& LiveOrThrow(const BlockTable& table) {
  const kv::Sequence* sequence = Live(table);
  if (!sequence) throw py::error_already_set();
  return *sequence;
}

// What one exported buffer holds.
struct Export {
  std::shared_ptr<kv::BlockId[]> blocks;
  Py_ssize_t shape;
  Py_ssize_t stride = sizeof(kv::BlockId);
};

int GetBuffer(PyObject* self, Py_buffer* view, int flags) {
  view->obj = nullptr;
  if (flags & PyBUF_WRITABLE) {
    PyErr_SetString(PyExc_BufferError, "a block table is read-only");
    return -1;
  }
  try {
    const auto& table = py::cast<const BlockTable&>(py::handle(self));
    const kv::Sequence* sequence = Live(table);
    if (!sequence) return -1;
    auto exported = std::make_unique<Export>(
        Export{.blocks = sequence->table.shared(), .shape = static_cast<Py_ssize_t>(sequence->num_blocks)});
    static kv::BlockId no_blocks;
    view->buf = exported->blocks ? exported->blocks.get() : &no_blocks;
    view->len = exported->shape * exported->stride;
    view->itemsize = exported->stride;
    view->readonly = 1;
    view->ndim = 1;
    view->format = (flags & PyBUF_FORMAT) ? const_cast<char*>("i") : nullptr;
    view->shape = (flags & PyBUF_ND) ? &exported->shape : nullptr;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? &exported->stride : nullptr;
    view->suboffsets = nullptr;
    view->internal = exported.release();
    view->obj = Py_NewRef(self);
    return 0;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_BufferError, error.what());
    return -1;
  }
}

void ReleaseBuffer(PyObject*, Py_buffer* view) { delete static_cast<Export*>(view->internal); }

py::array MakeArray(const BlockTable& table) {
  const kv::Sequence& sequence = LiveOrThrow(table);
  auto* held = new std::shared_ptr<kv::BlockId[]>(sequence.table.shared());
  py::capsule owner(held,
                    [](void* pointer) { delete static_cast<std::shared_ptr<kv::BlockId[]>*>(pointer); });
  py::array_t<kv::BlockId> array({static_cast<py::ssize_t>(sequence.num_blocks)}, sequence.table.data(),
                                 owner);
  array.attr("flags").attr("writeable") = false;
  return array;
}

}  // namespace

py::object MakeBlockTable(const py::object& manager, kv::SequenceId id) {
  BlockTable table{manager, ManagerOf(manager.ptr()), id};
  LiveOrThrow(table);
  return py::cast(std::move(table));
}

void BindBlockTable(py::module_& module) {
  py::class_<BlockTable>(module, "BlockTable", "A sequence's block table; read-only, no copy.",
                         py::custom_type_setup([](PyHeapTypeObject* type) {
                           type->as_buffer.bf_getbuffer = GetBuffer;
                           type->as_buffer.bf_releasebuffer = ReleaseBuffer;
                           type->ht_type.tp_as_buffer = &type->as_buffer;
                         }))
      .def("__len__", [](const BlockTable& table) { return LiveOrThrow(table).num_blocks; })
      .def("__getitem__",
           [](const BlockTable& table, int64_t index) {
             const kv::Sequence& sequence = LiveOrThrow(table);
             int64_t wrapped = index < 0 ? index + sequence.num_blocks : index;
             if (wrapped < 0 || wrapped >= sequence.num_blocks) {
               throw py::index_error("block index " + std::to_string(index) + " is out of range");
             }
             return sequence.table.data()[wrapped];
           })
      .def("numpy", MakeArray)
      // numpy would take a failing buffer for "not an array" and wrap the object; this one it heeds.
      .def(
          "__array__",
          [](const BlockTable& table, const py::object& dtype, const py::object& copy) -> py::object {
            py::array array = MakeArray(table);
            bool wants_copy = !copy.is_none() && copy.cast<bool>();
            py::object cast =
                dtype.is_none() ? py::object(array) : array.attr("astype")(dtype, py::arg("copy") = false);
            return wants_copy ? cast.attr("copy")() : cast;
          },
          py::arg("dtype") = py::none(), py::arg("copy") = py::none())
      .def_property_readonly("sequence", [](const BlockTable& table) { return table.id; });
}

}  // namespace twinjet::bindings
