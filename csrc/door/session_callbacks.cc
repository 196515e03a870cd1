// How nghttp2 calls a session.
#include <exception>
#include <new>

#include "door/session.h"

namespace twinjet::door {
namespace {

std::string_view View(const uint8_t* bytes, size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace

// nghttp2's callbacks, each forwarding to a method. None may throw through nghttp2's C frames, and the
// methods throw nothing but what running out of memory throws, which ends the connection.
struct Session::Callbacks {
  template <typename F>
  static int Guard(F&& f) {
    try {
      return f();
    } catch (const std::exception&) {
      return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
  }
  static Session* Of(void* user_data) { return static_cast<Session*>(user_data); }

  static int OnBeginHeaders(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnBeginHeaders(frame); });
  }
  static int OnBeginFrame(nghttp2_session*, const nghttp2_frame_hd* header, void* user_data) {
    return Guard([&] { return Of(user_data)->OnBeginFrame(header->type); });
  }
  static int OnInvalidFrame(nghttp2_session*, const nghttp2_frame*, int, void* user_data) {
    Of(user_data)->conduct_.EndHeaders();
    return 0;
  }
  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void* user_data) {
    return Guard(
        [&] { return Of(user_data)->OnHeader(frame, View(name, name_size), View(value, value_size)); });
  }
  static int OnInvalidHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name,
                             size_t name_size, const uint8_t*, size_t, uint8_t, void* user_data) {
    return Guard([&] { return Of(user_data)->OnInvalidHeader(frame->hd.stream_id, View(name, name_size)); });
  }
  static int OnFrame(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnFrame(frame); });
  }
  static int OnData(nghttp2_session*, uint8_t, int32_t stream_id, const uint8_t* data, size_t size,
                    void* user_data) {
    return Guard([&] { return Of(user_data)->OnData(stream_id, View(data, size)); });
  }
  static int OnFrameSent(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnFrameSent(frame); });
  }
  static int OnFrameNotSent(nghttp2_session* http2, const nghttp2_frame* frame, int, void* user_data) {
    // Headers that HTTP/2 cannot carry: the client must not wait for ever.
    if (frame->hd.type == NGHTTP2_HEADERS && Of(user_data)->Find(frame->hd.stream_id)) {
      nghttp2_submit_rst_stream(http2, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_INTERNAL_ERROR);
    }
    return 0;
  }
  static int OnStreamClose(nghttp2_session*, int32_t stream_id, uint32_t error_code, void* user_data) {
    return Guard([&] { return Of(user_data)->OnStreamClose(stream_id, error_code); });
  }
  static int SendData(nghttp2_session*, nghttp2_frame*, const uint8_t* header, size_t size,
                      nghttp2_data_source* source, void* user_data) {
    return Guard([&] { return Of(user_data)->SendData(header, size, static_cast<Stream*>(source->ptr)); });
  }
  static ssize_t ReadOutgoing(nghttp2_session*, int32_t, uint8_t*, size_t size, uint32_t* flags,
                              nghttp2_data_source* source, void* user_data) {
    try {
      return Of(user_data)->ReadOutgoing(static_cast<Stream*>(source->ptr), size, flags);
    } catch (const std::exception&) {
      return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    }
  }

  static nghttp2_session_callbacks* Make() {
    nghttp2_session_callbacks* table = nullptr;
    if (nghttp2_session_callbacks_new(&table) != 0) throw std::bad_alloc();
    nghttp2_session_callbacks_set_on_begin_headers_callback(table, &OnBeginHeaders);
    nghttp2_session_callbacks_set_on_begin_frame_callback(table, &OnBeginFrame);
    nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(table, &OnInvalidFrame);
    nghttp2_session_callbacks_set_on_header_callback(table, &OnHeader);
    nghttp2_session_callbacks_set_on_invalid_header_callback(table, &OnInvalidHeader);
    nghttp2_session_callbacks_set_on_frame_recv_callback(table, &OnFrame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(table, &OnData);
    nghttp2_session_callbacks_set_on_frame_send_callback(table, &OnFrameSent);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(table, &OnFrameNotSent);
    nghttp2_session_callbacks_set_on_stream_close_callback(table, &OnStreamClose);
    nghttp2_session_callbacks_set_send_data_callback(table, &SendData);
    return table;
  }
};

nghttp2_session_callbacks* Session::CallbackTable() {
  static nghttp2_session_callbacks* const table = Callbacks::Make();
  return table;
}

nghttp2_data_provider Session::MessagesOf(Stream* stream) {
  nghttp2_data_provider provider{};
  provider.source.ptr = stream;
  provider.read_callback = &Callbacks::ReadOutgoing;
  return provider;
}

}  // namespace twinjet::door
