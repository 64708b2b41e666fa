// States of sequences (krait/modules/state.h).
#include <tvm/ffi/string.h>

#include <sstream>

#include "ffi/model.h"
#include "krait/core/error.h"
#include "train/step_memory.h"

namespace krait::ffi {
namespace {

tvm::ffi::Array<StateRef> state_new(const ModelRef& model, std::int64_t count, const Word& dtype) {
  require(count >= 0, "count of states is ", count, ", expected 0 or more");
  const DType kept_as = dtype_of(dtype).value_or(DType::f32);
  const Exclusive use(model);
  const std::shared_ptr<SharedStates> shared = model->states(kept_as);
  // Memory comes state by state, and a system that has promised too much of it ends the process.
  const std::size_t bytes = shared->pool->fixed_bytes();
  if (!use.context().on_gpu() && static_cast<double>(count) * static_cast<double>(bytes) > machine_memory())
    fail(ErrorKind::out_of_memory, "count of states is ", count, ": at ", bytes,
         " bytes each they are more than the memory of this machine");
  tvm::ffi::Array<StateRef> states;
  for (std::int64_t i = 0; i < count; ++i)
    states.push_back(StateRef(tvm::ffi::make_object<StateObject>(model, shared, State(shared->pool))));
  return states;
}

StateRef state_fork(const StateRef& state) {
  const Exclusive use(state->model());
  return StateRef(tvm::ffi::make_object<StateObject>(state->model(), state->shared(), state->state().fork()));
}

void state_rollback(const StateRef& state, const StateRef& earlier) {
  const Exclusive use(state->model());
  require(
      state->shared() == earlier->shared(),
      "rollback to a state of another model or dtype, expected a fork of this or another state of its model");
  state->state().rollback(earlier->state());
  state->note_position();
}

void state_reset(const StateRef& state) {
  const Exclusive use(state->model());
  state->state().reset();
  state->note_position();
}

std::int64_t state_position(const StateRef& state) { return state->position(); }

Word state_dtype(const StateRef& state) { return std::string(name_of(state->shared()->pool->ssm_dtype())); }

std::int64_t state_nbytes(const StateRef& state) {
  const Exclusive use(state->model());
  return static_cast<std::int64_t>(state->state().nbytes());
}

tvm::ffi::Bytes state_save(const StateRef& state) {
  const Exclusive use(state->model());
  std::ostringstream image;
  state->state().save(image);
  return std::move(image).str();
}

void state_load(const StateRef& state, const tvm::ffi::Bytes& image) {
  const Exclusive use(state->model());
  std::istringstream in(std::string(image.data(), image.size()));
  state->state().load(in);
  state->note_position();
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(state_new, krait::ffi::state_new)
KRAIT_FFI(state_fork, krait::ffi::state_fork)
KRAIT_FFI(state_rollback, krait::ffi::state_rollback)
KRAIT_FFI(state_reset, krait::ffi::state_reset)
KRAIT_FFI(state_position, krait::ffi::state_position)
KRAIT_FFI(state_dtype, krait::ffi::state_dtype)
KRAIT_FFI(state_nbytes, krait::ffi::state_nbytes)
KRAIT_FFI(state_save, krait::ffi::state_save)
KRAIT_FFI(state_load, krait::ffi::state_load)
