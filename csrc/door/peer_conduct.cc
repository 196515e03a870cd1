#include "door/peer_conduct.h"

namespace twinjet::door {
namespace {

constexpr int kMaxPingStrikes = 2;

}  // namespace

bool TokenBucket::Spend(int64_t now_ns) {
  if (rate_ > 0) {
    // In a minute any bucket is full: the bound keeps the product small.
    const int64_t waited_ns = std::min<int64_t>(now_ns - filled_at_ns_, 60'000'000'000);
    const uint64_t gained = static_cast<uint64_t>(waited_ns / 1000) * rate_ / 1'000'000;
    if (gained > 0) {
      tokens_ = std::min(burst_, tokens_ + gained);
      filled_at_ns_ = now_ns;
    }
  }
  if (tokens_ == 0) return false;
  --tokens_;
  return true;
}

bool PeerConduct::OnPing(int64_t now_ns) {
  const bool is_early = has_pinged_ && now_ns - pinged_at_ns_ < Nanoseconds(limits_->client_ping_s);
  has_pinged_ = true;
  if (!is_early) {
    pinged_at_ns_ = now_ns;
    return true;
  }
  return ++num_strikes_ <= kMaxPingStrikes;
}

void PeerConduct::OnAnswered() {
  num_strikes_ = 0;
  has_pinged_ = false;
  idle_frames_.Refund(1);
}

bool PeerConduct::AreHeadersInTime(int64_t now_ns) const {
  return headers_since_ns_ == 0 || now_ns - headers_since_ns_ < Nanoseconds(limits_->header_s);
}

}  // namespace twinjet::door
