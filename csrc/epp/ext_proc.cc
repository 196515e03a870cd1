#include "epp/ext_proc.h"

#include "epp/wire_reader.h"

namespace twinjet::epp {
namespace {

constexpr std::string_view kSubsetNamespace = "envoy.lb.subset_hint";
constexpr std::string_view kSubsetKey = "x-gateway-destination-endpoint-subset";
constexpr std::string_view kSourceAddress = "source.address";

bool IsWhole(const WireReader& reader) { return !reader.is_cut() && !reader.is_broken(); }

// HeaderMap { repeated HeaderValue headers = 1 }, HeaderValue { key = 1, value = 2, raw_value = 3 }
bool ReadHeaderMap(std::string_view data, ProcessingRequest* request) {
  WireReader map(data);
  while (map.Next()) {
    if (!map.IsBytes(1)) continue;
    WireReader header(map.bytes());
    std::string_view key;
    std::string_view value;
    while (header.Next()) {
      if (header.IsBytes(1)) key = header.bytes();
      if ((header.IsBytes(2) || header.IsBytes(3)) && !header.bytes().empty()) value = header.bytes();
    }
    if (!IsWhole(header)) return false;
    request->headers.emplace_back(key, value);
  }
  return IsWhole(map);
}

// HttpHeaders { headers = 1, end_of_stream = 3 }, HttpTrailers { trailers = 1 }
bool ReadHeaders(std::string_view data, ProcessingRequest* request) {
  WireReader reader(data);
  while (reader.Next()) {
    if (reader.IsBytes(1) && !ReadHeaderMap(reader.bytes(), request)) return false;
    if (reader.IsNumber(3)) request->is_end_of_stream = reader.number() != 0;
  }
  return IsWhole(reader);
}

// HttpBody { body = 1, end_of_stream = 2, end_of_stream_without_message = 3 }
bool ReadBody(std::string_view data, ProcessingRequest* request) {
  WireReader reader(data);
  while (reader.Next()) {
    if (reader.IsBytes(1)) request->body = reader.bytes();
    if (reader.IsNumber(2) || reader.IsNumber(3)) request->is_end_of_stream |= reader.number() != 0;
  }
  return IsWhole(reader);
}

void AddAddresses(std::string_view text, ProcessingRequest* request) {
  while (!text.empty()) {
    size_t comma = text.find(',');
    std::string_view one = text.substr(0, comma);
    text.remove_prefix(comma == std::string_view::npos ? text.size() : comma + 1);
    while (one.starts_with(' ')) one.remove_prefix(1);
    while (one.ends_with(' ')) one.remove_suffix(1);
    if (!one.empty()) request->allowed.push_back(one);
  }
}

// google.protobuf.Value { string_value = 3, list_value = 6 { values = 1 } }
bool ReadAllowed(std::string_view data, ProcessingRequest* request, bool is_inner) {
  WireReader value(data);
  while (value.Next()) {
    if (value.IsBytes(3)) AddAddresses(value.bytes(), request);
    if (!value.IsBytes(6) || is_inner) continue;
    WireReader list(value.bytes());
    while (list.Next()) {
      if (list.IsBytes(1) && !ReadAllowed(list.bytes(), request, true)) return false;
    }
    if (!IsWhole(list)) return false;
  }
  return IsWhole(value);
}

// Calls visit(key, value) for each entry of a map<string, message> that is field 1 of `data`.
template <typename Visit>
bool ForEachEntry(std::string_view data, Visit visit) {
  WireReader map(data);
  while (map.Next()) {
    if (!map.IsBytes(1)) continue;
    WireReader entry(map.bytes());
    std::string_view key;
    std::string_view value;
    while (entry.Next()) {
      if (entry.IsBytes(1)) key = entry.bytes();
      if (entry.IsBytes(2)) value = entry.bytes();
    }
    if (!IsWhole(entry) || !visit(key, value)) return false;
  }
  return IsWhole(map);
}

// config.core.v3.Metadata { map<string, Struct> filter_metadata = 1 }, Struct { map<string, Value> fields = 1
// }
bool ReadMetadata(std::string_view data, ProcessingRequest* request) {
  return ForEachEntry(data, [&](std::string_view name, std::string_view fields) {
    if (name != kSubsetNamespace) return true;
    return ForEachEntry(fields, [&](std::string_view key, std::string_view value) {
      if (key != kSubsetKey) return true;
      request->has_allowed = true;
      return ReadAllowed(value, request, false);
    });
  });
}

// map<string, Struct> attributes, by the name of Envoy's filter; Value { string_value = 3 }
bool ReadAttributes(std::string_view entry_bytes, ProcessingRequest* request) {
  WireReader entry(entry_bytes);
  while (entry.Next()) {
    if (!entry.IsBytes(2)) continue;
    const bool is_read = ForEachEntry(entry.bytes(), [&](std::string_view key, std::string_view data) {
      if (key != kSourceAddress) return true;
      WireReader value(data);
      while (value.Next()) {
        if (value.IsBytes(3)) request->source_address = value.bytes();
      }
      return IsWhole(value);
    });
    if (!is_read) return false;
  }
  return IsWhole(entry);
}

// ProtocolConfiguration { request_body_mode = 1, response_body_mode = 2 }; 0, NONE, is not on the wire.
bool ReadProtocol(std::string_view data, ProcessingRequest* request) {
  request->request_body_mode = request->response_body_mode = 0;
  WireReader reader(data);
  while (reader.Next()) {
    if (reader.IsNumber(1)) request->request_body_mode = static_cast<int32_t>(reader.number() & 0xFF);
    if (reader.IsNumber(2)) request->response_body_mode = static_cast<int32_t>(reader.number() & 0xFF);
  }
  return IsWhole(reader);
}

}  // namespace

bool ReadProcessingRequest(std::string_view data, ProcessingRequest* request) {
  using Kind = ProcessingRequest::Kind;
  WireReader reader(data);
  while (reader.Next()) {
    if (reader.IsBytes(8)) {
      if (!ReadMetadata(reader.bytes(), request)) return false;
    } else if (reader.IsBytes(9)) {
      if (!ReadAttributes(reader.bytes(), request)) return false;
    } else if (reader.IsBytes(11)) {
      if (!ReadProtocol(reader.bytes(), request)) return false;
    } else if (reader.IsBytes(4) || reader.IsBytes(5)) {
      request->kind = reader.IsBytes(4) ? Kind::kRequestBody : Kind::kResponseBody;
      if (!ReadBody(reader.bytes(), request)) return false;
    } else {
      for (Kind kind :
           {Kind::kRequestHeaders, Kind::kResponseHeaders, Kind::kRequestTrailers, Kind::kResponseTrailers}) {
        if (!reader.IsBytes(static_cast<uint32_t>(kind))) continue;
        request->kind = kind;
        if (!ReadHeaders(reader.bytes(), request)) return false;
      }
    }
  }
  return IsWhole(reader);
}

}  // namespace twinjet::epp
