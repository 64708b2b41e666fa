// Lends working memory to callers on any thread, and keeps what they give back for the next.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace krait::tokenizer {

template <typename Workspace>
class WorkspacePool {
 public:
  // Returns its workspace to the pool at the end of its life.
  class Lease {
   public:
    Lease(WorkspacePool& pool, std::unique_ptr<Workspace> workspace)
        : pool_(pool), workspace_(std::move(workspace)) {}
    ~Lease() {
      if (workspace_) pool_.give_back(std::move(workspace_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    [[nodiscard]] Workspace& operator*() const { return *workspace_; }
    // Frees the memory now, where it has grown too large to keep.
    void discard() { workspace_.reset(); }

   private:
    WorkspacePool& pool_;
    std::unique_ptr<Workspace> workspace_;
  };

  [[nodiscard]] Lease take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        auto workspace = std::move(free_.back());
        free_.pop_back();
        return Lease(*this, std::move(workspace));
      }
    }
    return Lease(*this, std::make_unique<Workspace>());
  }

 private:
  void give_back(std::unique_ptr<Workspace> workspace) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(workspace));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace krait::tokenizer
