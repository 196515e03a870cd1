// PeerConduct: how a connection's client behaves, against what it may do: pings, frames that carry nothing,
// and headers that do not end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "door/options.h"

namespace twinjet::door {

inline int64_t Nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

// Spends up to burst at once and regains rate a second.
class TokenBucket {
 public:
  TokenBucket(uint64_t burst, uint64_t rate) : burst_(burst), rate_(rate), tokens_(burst) {}
  bool Spend(int64_t now_ns);
  void Refund(uint64_t tokens) { tokens_ = std::min(burst_, tokens_ + tokens); }

 private:
  const uint64_t burst_;
  const uint64_t rate_;
  uint64_t tokens_;
  int64_t filled_at_ns_ = 0;
};

// Methods that give a bool: false when the client has gone too far.
class PeerConduct {
 public:
  PeerConduct(const Options* limits, int64_t now_ns)
      : limits_(limits),
        pinged_at_ns_(now_ns),
        idle_frames_(limits->idle_frame_burst, limits->idle_frame_rate) {}

  // gRPC's policy: a ping that comes sooner than allowed after the last one is a strike, unless something
  // was sent to the client meanwhile.
  bool OnPing(int64_t now_ns);
  bool OnIdleFrame(int64_t now_ns) { return idle_frames_.Spend(now_ns); }
  // The client was sent headers or data.
  void OnAnswered();

  void BeginHeaders(int64_t now_ns) { headers_since_ns_ = now_ns; }
  void EndHeaders() { headers_since_ns_ = 0; }
  bool AreHeadersInTime(int64_t now_ns) const;

 private:
  const Options* const limits_;
  int64_t pinged_at_ns_;  // the last time that was no strike
  bool has_pinged_ = false;
  int num_strikes_ = 0;
  int64_t headers_since_ns_ = 0;  // when a header block began that has not ended
  TokenBucket idle_frames_;
};

}  // namespace twinjet::door
