// Carrier: takes the messages of a step to their clients, so that nobody has to be woken for them.
#pragma once

#include <memory>
#include <span>
#include <string>

namespace twinjet::stream {

class Carrier {
 public:
  // A ready message and the client's call, as Stream::Attach was given it.
  struct Parcel {
    std::shared_ptr<void> call;
    std::string bytes;
  };

  virtual ~Carrier() = default;
  // Whether a call takes messages now; while it does not, its stream merges. Any thread; quick.
  virtual bool HasRoom(const std::shared_ptr<void>& call) = 0;
  // The messages of one step, those of a call in order. Any thread; must not block.
  virtual void Carry(std::span<const Parcel> parcels) = 0;
};

}  // namespace twinjet::stream
