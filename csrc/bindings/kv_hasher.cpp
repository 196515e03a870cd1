// twinjet._core.BlockHasher.
#include <pybind11/stl.h>

#include <bit>
#include <map>
#include <string>

#include "kv_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

constexpr size_t kLongTokens = 4096;  // some ten microseconds: worth giving up the GIL

struct HashRequest {
  std::span<const int32_t> tokens;
  kv::BlockHash parent;
  std::vector<std::pair<size_t, std::string>> extras;  // by block index, ascending
};

HashRequest MakeRequest(const kv::BlockHasher& hasher, const TokenIds& tokens, const py::bytes& salt,
                        const std::optional<py::bytes>& parent,
                        const std::optional<std::map<int64_t, py::bytes>>& extra_keys, int64_t start) {
  HashRequest request;
  auto num_tokens = static_cast<int64_t>(tokens.span().size());
  if (start < 0 || start > num_tokens || start % hasher.block_size() != 0) {
    throw py::value_error("start must be a multiple of block_size within the tokens, not " +
                          std::to_string(start));
  }
  request.tokens = tokens.span().subspan(static_cast<size_t>(start));
  if (parent) {
    if (BytesOf(*parent).size() != kv::BlockHash::kBytes) throw py::value_error("parent must have 16 bytes");
    request.parent = kv::BlockHash::FromBytes(BytesOf(*parent).data());
  } else {
    request.parent = hasher.Root(BytesOf(salt));
  }
  if (extra_keys) {
    auto num_blocks = static_cast<int64_t>(request.tokens.size()) / hasher.block_size();
    for (const auto& [index, extra] : *extra_keys) {
      if (index < 0) throw py::value_error("an index in extra_keys is negative: " + std::to_string(index));
      if (index < num_blocks) request.extras.emplace_back(static_cast<size_t>(index), std::string(extra));
    }
  }
  return request;
}

std::vector<kv::BlockHash> Run(const kv::BlockHasher& hasher, const HashRequest& request) {
  auto block_size = static_cast<size_t>(hasher.block_size());
  std::vector<kv::BlockHash> hashes(request.tokens.size() / block_size);
  kv::BlockHash parent = request.parent;
  size_t done = 0;
  auto hash_until = [&](size_t end) {
    hasher.HashBlocks(parent, request.tokens.data() + done * block_size,
                      std::span(hashes).subspan(done, end - done));
    if (end > done) parent = hashes[end - 1];
    done = end;
  };
  for (const auto& [index, extra] : request.extras) {
    hash_until(index);
    parent = hasher.Extend(parent, {reinterpret_cast<const uint8_t*>(extra.data()), extra.size()});
  }
  hash_until(hashes.size());
  return hashes;
}

std::vector<kv::BlockHash> Hash(const kv::BlockHasher& hasher, const py::object& tokens,
                                const py::bytes& salt, const std::optional<py::bytes>& parent,
                                const std::optional<std::map<int64_t, py::bytes>>& extra_keys,
                                int64_t start) {
  TokenIds ids;
  if (!ids.Read(tokens.ptr())) throw py::error_already_set();
  HashRequest request = MakeRequest(hasher, ids, salt, parent, extra_keys, start);
  if (request.tokens.size() < kLongTokens) return Run(hasher, request);
  py::gil_scoped_release released;
  return Run(hasher, request);
}

}  // namespace

std::span<const uint8_t> BytesOf(const py::bytes& bytes) {
  return {reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(bytes.ptr())),
          static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

py::bytes ToBytes(std::span<const kv::BlockHash> hashes) {
  return {reinterpret_cast<const char*>(hashes.data()), hashes.size_bytes()};
}

kv::BlockHasher::Algorithm AlgorithmByName(std::string_view name) {
  if (name == "sha256") return kv::BlockHasher::Algorithm::kSha256;
  if (name == "siphash") return kv::BlockHasher::Algorithm::kSipHash;
  throw py::value_error("unknown algorithm '" + std::string(name) + "'; expected 'sha256' or 'siphash'");
}

kv::HashKey KeyOf(const py::object& key) {
  py::object bytes = key.is_none() ? py::module_::import("os").attr("urandom")(kv::kHashKeyBytes) : key;
  if (!PyBytes_Check(bytes.ptr())) throw py::type_error("the hash key must be bytes or None");
  std::span<const uint8_t> given = BytesOf(py::reinterpret_borrow<py::bytes>(bytes));
  if (given.size() != kv::kHashKeyBytes) {
    throw py::value_error("the hash key must have 32 bytes, not " + std::to_string(given.size()));
  }
  kv::HashKey result;
  std::copy(given.begin(), given.end(), result.begin());
  return result;
}

int32_t CheckedBlockSize(int64_t block_size) {
  if (block_size < 1 || block_size > kv::kMaxBlockSize ||
      !std::has_single_bit(static_cast<uint64_t>(block_size))) {
    throw py::value_error("block_size must be a power of two in 1..65536, not " + std::to_string(block_size));
  }
  return static_cast<int32_t>(block_size);
}

std::vector<kv::BlockHash> HashFullBlocks(const kv::BlockHasher& hasher, const kv::BlockHash& parent,
                                          std::span<const int32_t> tokens) {
  HashRequest request{.tokens = tokens, .parent = parent, .extras = {}};
  if (tokens.size() < kLongTokens) return Run(hasher, request);
  py::gil_scoped_release released;
  return Run(hasher, request);
}

void BindBlockHasher(py::module_& module) {
  py::class_<kv::BlockHasher>(module, "BlockHasher", "Chained, keyed 128-bit block hashes of token ids.")
      .def(py::init([](int64_t block_size, const std::string& algorithm, const py::object& key) {
             int32_t checked = CheckedBlockSize(block_size);
             return std::make_unique<kv::BlockHasher>(checked, AlgorithmByName(algorithm), KeyOf(key));
           }),
           py::arg("block_size"), py::kw_only(), py::arg("algorithm") = "sha256", py::arg("key") = py::none())
      .def_property_readonly("block_size", &kv::BlockHasher::block_size)
      .def_property_readonly("algorithm",
                             [](const kv::BlockHasher& hasher) {
                               return hasher.algorithm() == kv::BlockHasher::Algorithm::kSha256 ? "sha256"
                                                                                                : "siphash";
                             })
      .def_property_readonly("implementation", &kv::BlockHasher::implementation)
      .def(
          "root",
          [](const kv::BlockHasher& hasher, const py::bytes& salt) {
            kv::BlockHash root = hasher.Root(BytesOf(salt));
            return ToBytes({&root, 1});
          },
          py::arg("salt") = py::bytes())
      .def(
          "hash_blocks",
          [](const kv::BlockHasher& hasher, const py::object& tokens, const py::bytes& salt,
             const std::optional<py::bytes>& parent,
             const std::optional<std::map<int64_t, py::bytes>>& extra_keys, int64_t start) {
            std::vector<kv::BlockHash> hashes = Hash(hasher, tokens, salt, parent, extra_keys, start);
            py::list result(hashes.size());
            for (size_t i = 0; i < hashes.size(); ++i) {
              PyObject* bytes =
                  PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&hashes[i]), kv::BlockHash::kBytes);
              if (!bytes) throw py::error_already_set();
              PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), bytes);
            }
            return result;
          },
          py::arg("tokens"), py::kw_only(), py::arg("salt") = py::bytes(), py::arg("parent") = py::none(),
          py::arg("extra_keys") = py::none(), py::arg("start") = 0)
      .def(
          "hash_bytes",
          [](const kv::BlockHasher& hasher, const py::object& tokens, const py::bytes& salt,
             const std::optional<py::bytes>& parent,
             const std::optional<std::map<int64_t, py::bytes>>& extra_keys,
             int64_t start) { return ToBytes(Hash(hasher, tokens, salt, parent, extra_keys, start)); },
          py::arg("tokens"), py::kw_only(), py::arg("salt") = py::bytes(), py::arg("parent") = py::none(),
          py::arg("extra_keys") = py::none(), py::arg("start") = 0);
}

}  // namespace twinjet::bindings
