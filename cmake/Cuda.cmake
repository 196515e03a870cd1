# Resolves TWINJET_CUDA to TWINJET_WITH_CUDA and enables the language. The architectures are named
# outright because `native` fails where no GPU is; the PTX serves devices newer than this compiler.
# The runtime is linked statically and finds the driver when first used: nothing here needs a GPU, its
# driver or libcudart.so to build, to load or to import.
include(CheckLanguage)
set(TWINJET_CUDA_ARCHITECTURES "80-real;89-real;90a-real;100-real;100-virtual" CACHE STRING
  "CMAKE_CUDA_ARCHITECTURES of the CUDA side")
set(TWINJET_WITH_CUDA OFF)
if(NOT TWINJET_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(TWINJET_WITH_CUDA ON)
  elseif(TWINJET_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TWINJET_CUDA=ON, but no CUDA compiler was found; put nvcc on PATH or set CUDACXX")
  endif()
endif()
if(TWINJET_WITH_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES ${TWINJET_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  find_package(CUDAToolkit REQUIRED)
  # -fmad=false beside the explicit roundings of sampler/hd.h: nothing is fused behind its back.
  target_compile_options(twinjet_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-fmad=false -lineinfo -Xcompiler=-Wall,-Wextra,-Wshadow>")
  if(TWINJET_WERROR)
    target_compile_options(twinjet_options INTERFACE
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Werror>")
  endif()
endif()
