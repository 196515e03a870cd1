// What the KV binding files give each other.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string_view>
#include <vector>

#include "kv/block_manager.h"
#include "kv_convert.h"

namespace twinjet::bindings {

// kv_hasher.cpp
void BindBlockHasher(pybind11::module_& module);
kv::BlockHasher::Algorithm AlgorithmByName(std::string_view name);
// 32 bytes as given, or from the operating system for None.
kv::HashKey KeyOf(const pybind11::object& key);
int32_t CheckedBlockSize(int64_t block_size);
std::span<const uint8_t> BytesOf(const pybind11::bytes& bytes);
pybind11::bytes ToBytes(std::span<const kv::BlockHash> hashes);
// Hashes the full blocks of `tokens`, without the GIL where that takes long.
std::vector<kv::BlockHash> HashFullBlocks(const kv::BlockHasher& hasher, const kv::BlockHash& parent,
                                          std::span<const int32_t> tokens);

// kv_fast.cpp: the calls made per request and step, as plain C functions on the type.
void AddKvFastMethods(pybind11::handle manager_type);

// kv_table.cpp
void BindBlockTable(pybind11::module_& module);
pybind11::object MakeBlockTable(const pybind11::object& manager, kv::SequenceId id);

// kv_manager.cpp
void BindBlockManager(pybind11::module_& module);

}  // namespace twinjet::bindings
