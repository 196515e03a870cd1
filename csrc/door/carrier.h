// StreamCarrier: how the messages that the pump makes ready (csrc/stream) reach the door's calls: all
// messages of a step are handed to each connection's thread at once.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "door/call.h"
#include "stream/carrier.h"

namespace twinjet::door {

// Its calls are Calls. It may outlive the door; then it drops what it is given.
class StreamCarrier final : public stream::Carrier {
 public:
  // write_ahead_bytes: of one call, above which it has no room.
  explicit StreamCarrier(size_t write_ahead_bytes) : write_ahead_bytes_(write_ahead_bytes) {}

  bool HasRoom(const std::shared_ptr<void>& call) override;
  void Carry(std::span<const Parcel> parcels) override;

 private:
  const size_t write_ahead_bytes_;
};

}  // namespace twinjet::door
